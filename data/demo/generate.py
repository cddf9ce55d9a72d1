"""Writes the demo's dialogues: invented doctor-patient talks with a note section each, in MTS-Dialog's schema.

usage: python data/demo/generate.py            (writes train.csv, validation.csv and test.csv beside this file)

A talk is a few *facts* of one section (a medicine, a pain, a habit ...). Every fact knows how it is asked and told, how a note
states it, and, for the pretraining text of pretrain.py, how a doctor reads it back and what can be asked about it.
All of it is made up by this script; no text, name or number comes from a patient or from another dataset.
"""

import csv
import random
from pathlib import Path

SEED = 20261123
ROWS = {"train": 1200, "validation": 100, "test": 200}
# Drugs, jobs and surnames at these positions of their list are heard in validation and test talks only, never in train.
HELD_OUT = 7  # every seventh

DRUGS = (
    "lisinopril metformin atorvastatin amlodipine omeprazole metoprolol losartan gabapentin sertraline furosemide simvastatin "
    "levothyroxine prednisone tramadol citalopram trazodone pantoprazole carvedilol warfarin clopidogrel escitalopram fluoxetine "
    "montelukast tamsulosin meloxicam bupropion duloxetine rosuvastatin propranolol allopurinol cetirizine loratadine naproxen "
    "ibuprofen aspirin acetaminophen amoxicillin azithromycin ciprofloxacin doxycycline cephalexin clindamycin baclofen "
    "cyclobenzaprine diclofenac famotidine glipizide glyburide hydrochlorothiazide spironolactone diltiazem verapamil digoxin "
    "lamotrigine levetiracetam topiramate venlafaxine mirtazapine quetiapine risperidone buspirone hydroxyzine sumatriptan "
    "methotrexate finasteride oxybutynin ranitidine pravastatin valsartan benazepril nifedipine clonidine terazosin apixaban "
    "rivaroxaban pioglitazone sitagliptin insulin colchicine estradiol"
).split()
ALLERGENS = (
    "penicillin sulfa codeine morphine latex peanuts shellfish eggs milk soy strawberries kiwi pollen dust bees "
    "aspirin ibuprofen iodine cephalexin amoxicillin erythromycin tetracycline vancomycin walnuts sesame mango adhesive nickel"
).split()
REACTIONS = {  # how it is told: how it is noted
    "a rash": "a rash",
    "hives": "hives",
    "my throat swells up": "throat swelling",
    "my lips swell": "lip swelling",
    "I throw up": "vomiting",
    "I get very itchy": "itching",
    "I cannot breathe well": "shortness of breath",
    "my face turns red": "facial flushing",
    "I feel dizzy": "dizziness",
    "I get an upset stomach": "stomach upset",
}
DOSES = (
    2,
    5,
    8,
    10,
    12,
    15,
    20,
    25,
    30,
    40,
    50,
    60,
    75,
    80,
    90,
    100,
    120,
    150,
    200,
    250,
    300,
    400,
    500,
    600,
    750,
    800,
    850,
)
FREQUENCIES = {
    "once a day": "daily",
    "every morning": "every morning",
    "at bedtime": "at bedtime",
    "twice a day": "twice a day",
    "three times a day": "three times a day",
    "every eight hours": "every 8 hours",
    "once a week": "weekly",
    "only when I need it": "as needed",
    "with meals": "with meals",
    "every other day": "every other day",
}
DISEASES = {
    "high blood pressure": "hypertension",
    "diabetes": "diabetes",
    "asthma": "asthma",
    "high cholesterol": "hyperlipidemia",
    "acid reflux": "gastroesophageal reflux disease",
    "an underactive thyroid": "hypothyroidism",
    "thinning bones": "osteoporosis",
    "wear and tear arthritis": "osteoarthritis",
    "gout": "gout",
    "migraines": "migraines",
    "depression": "depression",
    "anxiety": "anxiety",
    "kidney stones": "kidney stones",
    "an irregular heartbeat": "atrial fibrillation",
    "a heart attack": "myocardial infarction",
    "a stroke": "stroke",
    "seizures": "epilepsy",
    "a stomach ulcer": "peptic ulcer disease",
    "hay fever": "allergic rhinitis",
    "weak kidneys": "chronic kidney disease",
    "low iron": "anemia",
    "psoriasis": "psoriasis",
    "glaucoma": "glaucoma",
    "sleep apnea": "sleep apnea",
    "emphysema": "emphysema",
    "hepatitis": "hepatitis",
    "lupus": "lupus",
    "breast cancer": "breast cancer",
    "colon cancer": "colon cancer",
    "pneumonia": "pneumonia",
}
SURGERIES = {  # (how it is told, how it is noted); {side} where a side belongs
    "my appendix out": "appendectomy",
    "my gallbladder out": "cholecystectomy",
    "my tonsils out": "tonsillectomy",
    "a hysterectomy": "hysterectomy",
    "a C section": "cesarean section",
    "a bypass on my heart": "coronary artery bypass",
    "a stent put in": "coronary stent placement",
    "a hernia fixed": "hernia repair",
    "my {side} knee replaced": "{side} knee replacement",
    "my {side} hip replaced": "{side} hip replacement",
    "surgery on my {side} shoulder": "{side} shoulder surgery",
    "my {side} wrist pinned": "{side} wrist fixation",
    "a cataract taken out of my {side} eye": "{side} cataract extraction",
    "carpal tunnel surgery on my {side} hand": "{side} carpal tunnel release",
    "my spine fused": "spinal fusion",
    "a pacemaker put in": "pacemaker placement",
    "part of my colon removed": "partial colectomy",
    "half of my thyroid taken out": "thyroid lobectomy",
}
PARTS = "knee shoulder hip ankle wrist elbow foot hand heel thumb calf thigh ear eye jaw forearm shin groin collarbone big toe".split()
PARTS[-2:] = ["big toe"]
SYMPTOMS = (
    "chest pain, a headache, a cough, back pain, stomach pain, dizziness, shortness of breath, a sore throat, neck pain, a fever, "
    "nausea, diarrhea, constipation, heartburn, palpitations, fatigue, a runny nose, trouble sleeping, numbness in the fingers, leg swelling, "
    "a skin rash, blurry vision, joint stiffness, night sweats, weight loss, burning urination"
).split(", ")
SUDDEN = (
    "chest pain",
    "a headache",
    "stomach pain",
    "dizziness",
    "shortness of breath",
    "a fever",
    "nausea",
    "diarrhea",
    "palpitations",
    "blurry vision",
)
REVIEW = (
    "fever, chills, cough, nausea, vomiting, chest pain, headaches, dizziness, shortness of breath, palpitations, diarrhea, constipation, "
    "blood in the stool, blurry vision, hearing loss, joint pain, weakness, numbness, weight loss, night sweats, leg swelling, rashes, "
    "fainting, wheezing, trouble swallowing, back pain"
).split(", ")
WORSE = "walking, climbing stairs, lifting, lying down, bending over, coughing, cold weather, eating, standing up, driving, deep breaths, exercise".split(
    ", "
)
BETTER = "rest, ice, heat, stretching, sitting still, ibuprofen, acetaminophen, a hot shower, lying flat, massage, antacids, fresh air".split(
    ", "
)
CAUSES = {
    "I fell off a ladder": "a fall from a ladder",
    "I slipped on the ice": "a slip on ice",
    "I twisted it playing soccer": "a soccer injury",
    "a box dropped on it": "a falling box",
    "I was in a car accident": "a car accident",
    "I was moving furniture": "moving furniture",
    "I went for a long run": "a long run",
    "I tripped over the dog": "a trip over a dog",
    "I was gardening all day": "gardening",
    "I fell off my bike": "a bicycle fall",
}
JOBS = (
    "teacher nurse plumber farmer welder baker cashier lawyer waiter painter carpenter mechanic electrician librarian dentist pilot "
    "butcher tailor janitor cook barber gardener roofer accountant engineer musician reporter florist miner fisherman firefighter "
    "veterinarian translator surveyor bricklayer salesman secretary driver programmer judge"
).split()
RELATIVES = "mother father sister brother grandmother grandfather aunt uncle son daughter".split()
SURNAMES = (
    "Abbott Barnes Castillo Dawson Ellison Fletcher Garza Hammond Ibarra Jennings Kowalski Lindgren Maddox Navarro Okafor Patel "
    "Quinn Rhodes Sandoval Thornton Underwood Vance Whitaker Xiong Yates Zimmer Bautista Cho Delgado Eriksen Farouk Goldberg "
    "Huang Iverson Jansen Khan Larson Moreau Nolan Ortega"
).split()
VACCINES = {
    "flu": "influenza",
    "tetanus": "tetanus",
    "pneumonia": "pneumococcal",
    "shingles": "zoster",
    "hepatitis B": "hepatitis B",
    "measles": "measles",
}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def spell(n: int) -> str:
    """An integer from 0 to 9999 in words, years as they are spoken (1998: nineteen ninety eight)."""
    if n >= 2000:
        return "two thousand" + (f" {spell(n - 2000)}" if n > 2000 else "")
    if n >= 1100:
        return spell(n // 100) + (f" {'o ' if n % 100 < 10 else ''}{spell(n % 100)}" if n % 100 else " hundred")
    if n >= 100:
        return spell(n // 100) + " hundred" + (f" {spell(n % 100)}" if n % 100 else "")
    if n >= 20:
        return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")
    return ONES[n]


class Speech:
    """Draws words for one talk: `pick` from a list, `number` as digits or words; `seen` says which entities this split may use."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split

    def pick(self, options):
        return self.rng.choice(list(options))

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def number(self, n: int) -> str:
        return spell(n) if self.chance(0.6) else str(n)

    def entity(self, options):
        options = list(options)
        return self.pick([o for i, o in enumerate(options) if self.split != "train" or i % HELD_OUT != HELD_OUT - 1])

    def count(self, n: int, unit: str) -> str:
        """A number with its unit as it is spoken: "a week", "two weeks"."""
        if n == 1:
            return f"{self.pick(['one', 'a', '1'])} {unit}"
        return f"{self.number(n)} {unit}s"


def plural(n: int, unit: str) -> str:
    return f"{n} {unit}" if n == 1 else f"{n} {unit}s"


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def bare(text: str) -> str:
    """Without a leading article: "a cough" is "cough" in a note."""
    return text.removeprefix("a ").removeprefix("an ")


def listed(items) -> str:
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- facts
# Each kind: draw(s) -> slots; tell(s, x) -> turns; note(x) -> sentence; back(x) -> what a doctor repeats; ask(x) -> [(question, answer)]


def draw_medicine(s):
    return {"drug": s.entity(DRUGS), "dose": s.pick(DOSES), "often": s.pick(FREQUENCIES)}


def tell_medicine(s, x):
    dose = s.number(x["dose"])
    drug, often = x["drug"], x["often"]
    said = s.pick(
        [
            f"I take {drug}, {dose} milligrams, {often}.",
            f"There is the {drug}. {capital(dose)} milligrams {often}.",
            f"{capital(drug)}. It is {dose} milligrams and I take it {often}.",
            f"I am on {dose} milligrams of {drug} {often}.",
            f"They put me on {drug}, {dose} milligrams, and I use it {often}.",
        ]
    )
    asked = s.pick(
        [
            "What medicines do you take?",
            "Which medications are you on right now?",
            "Anything you take regularly?",
            "Tell me about your pills.",
            "And what else do you take?",
        ]
    )
    if s.chance(0.3):
        return [
            ("D", asked),
            ("P", s.pick([f"I take {drug}.", f"{capital(drug)}.", f"Just the {drug}, I think."])),
            (
                "D",
                s.pick(["What dose, and how often?", "How much of it, and when?", f"How do you take the {drug}?"]),
            ),
            (
                "P",
                s.pick(
                    [
                        f"{capital(dose)} milligrams, {often}.",
                        f"It is {dose} milligrams, {often}.",
                        f"{capital(often)}, {dose} milligrams.",
                    ]
                ),
            ),
        ]
    return [("D", asked), ("P", said)]


def note_medicine(x):
    return f"{capital(x['drug'])} {x['dose']} mg {FREQUENCIES[x['often']]}."


def back_medicine(x):
    return f"you take {x['drug']} {x['dose']} mg {FREQUENCIES[x['often']]}"


def ask_medicine(x):
    return [
        ("Which medicine is taken?", x["drug"]),
        (f"What is the dose of {x['drug']}?", f"{x['dose']} mg"),
        (f"How often is {x['drug']} taken?", FREQUENCIES[x["often"]]),
    ]


def draw_stopped(s):
    return {"drug": s.entity(DRUGS), "why": s.pick(REACTIONS)}


def tell_stopped(s, x):
    why = x["why"] if x["why"].startswith(("I ", "my ")) else f"it gave me {x['why']}"
    return [
        (
            "D",
            s.pick(
                [
                    f"Are you still taking {x['drug']}?",
                    f"What about the {x['drug']}?",
                    f"Do you still use your {x['drug']}?",
                ]
            ),
        ),
        (
            "P",
            s.pick([f"No, I stopped it. {capital(why)}.", f"I quit it because {why}.", f"Not anymore, {why}."]),
        ),
    ]


def note_stopped(x):
    return f"Stopped {x['drug']} because of {REACTIONS[x['why']]}."


def back_stopped(x):
    return f"you stopped {x['drug']} because of {REACTIONS[x['why']]}"


def ask_stopped(x):
    return [
        ("Which medicine was stopped?", x["drug"]),
        (f"Why was {x['drug']} stopped?", REACTIONS[x["why"]]),
    ]


def draw_allergy(s):
    return {"to": s.entity(ALLERGENS), "does": s.pick(REACTIONS)}


def tell_allergy(s, x):
    does = x["does"] if x["does"].startswith(("I ", "my ")) else f"I get {x['does']}"
    asked = s.pick(
        [
            "Any allergies?",
            "Are you allergic to anything?",
            "Is there anything you react to?",
            "Do you have allergies that I should know about?",
        ]
    )
    if s.chance(0.4):
        return [
            ("D", asked),
            ("P", s.pick([f"Yes, {x['to']}.", f"I cannot have {x['to']}.", f"{capital(x['to'])}."])),
            ("D", s.pick(["What happens?", "What does it do to you?", "And what kind of reaction is that?"])),
            ("P", f"{capital(does)}."),
        ]
    return [
        ("D", asked),
        (
            "P",
            s.pick(
                [
                    f"Yes, I am allergic to {x['to']}, {does}.",
                    f"{capital(x['to'])}. {capital(does)}.",
                    f"When I have {x['to']}, {does}.",
                ]
            ),
        ),
    ]


def note_allergy(x):
    return f"{capital(x['to'])}, which causes {REACTIONS[x['does']]}."


def back_allergy(x):
    return f"{x['to']} causes {REACTIONS[x['does']]}"


def ask_allergy(x):
    return [("What is the allergy?", x["to"]), (f"What does {x['to']} cause?", REACTIONS[x["does"]])]


def draw_pain(s):
    n = s.rng.randint(1, 11)
    unit = s.pick(["day", "week", "month", "year"])
    return {"side": s.pick(["left", "right"]), "part": s.pick(PARTS), "n": n, "unit": unit}


def tell_pain(s, x):
    where, long = f"{x['side']} {x['part']}", s.count(x["n"], x["unit"])
    asked = s.pick(
        [
            "What brings you in today?",
            "What can I do for you?",
            "So, what is going on?",
            "How can I help you today?",
            "What seems to be the problem?",
        ]
    )
    if s.chance(0.5):
        return [
            ("D", asked),
            (
                "P",
                s.pick(
                    [
                        f"My {where} hurts.",
                        f"It is my {where}, it is killing me.",
                        f"I have this pain in my {where}.",
                        f"My {where} has been bothering me.",
                    ]
                ),
            ),
            (
                "D",
                s.pick(
                    [
                        "How long has that been going on?",
                        "Since when?",
                        "For how long now?",
                        "When did it start?",
                    ]
                ),
            ),
            (
                "P",
                s.pick([f"About {long}.", f"For {long} now.", f"It started {long} ago.", f"I would say {long}."]),
            ),
        ]
    return [
        ("D", asked),
        (
            "P",
            s.pick(
                [
                    f"My {where} has been hurting for {long}.",
                    f"I have had pain in my {where} for {long}.",
                    f"For {long} now my {where} has been sore.",
                ]
            ),
        ),
    ]


def note_pain(x):
    return f"{capital(x['side'])} {x['part']} pain for {plural(x['n'], x['unit'])}."


def back_pain(x):
    return f"your {x['side']} {x['part']} has hurt for {plural(x['n'], x['unit'])}"


def ask_pain(x):
    return [
        ("What hurts?", f"{x['side']} {x['part']}"),
        ("Which side?", x["side"]),
        ("For how long?", plural(x["n"], x["unit"])),
    ]


def draw_symptom(s):
    what, unit = s.pick(SYMPTOMS), s.pick(["day", "week", "month", "hour"])
    if unit == "hour" and what not in SUDDEN:
        unit = "day"
    return {"what": what, "n": s.rng.randint(1, 11), "unit": unit}


def tell_symptom(s, x):
    long = s.count(x["n"], x["unit"]).replace("a hour", "an hour")
    asked = s.pick(
        [
            "What brings you in today?",
            "What can I do for you?",
            "So, what is going on?",
            "How are you feeling?",
            "Tell me what is wrong.",
        ]
    )
    return s.pick(
        [
            [("D", asked), ("P", f"I have had {x['what']} for {long}.")],
            [
                ("D", asked),
                ("P", f"I have {x['what']}."),
                ("D", s.pick(["Since when?", "How long has it lasted?"])),
                ("P", f"{capital(long)}."),
            ],
            [("D", asked), ("P", f"It is {x['what']}. It started {long} ago.")],
        ]
    )


def note_symptom(x):
    return f"{capital(bare(x['what']))} for {plural(x['n'], x['unit'])}."


def back_symptom(x):
    return f"you have had {x['what']} for {plural(x['n'], x['unit'])}"


def ask_symptom(x):
    return [
        ("What is the complaint?", bare(x["what"])),
        ("How long has it lasted?", plural(x["n"], x["unit"])),
    ]


def draw_age(s):
    return {"age": s.rng.randint(18, 89), "sex": s.pick(["man", "woman"])}


def tell_age(s, x):
    return s.pick(
        [
            [
                ("D", f"{'Sir' if x['sex'] == 'man' else 'Ma am'}, how old are you?"),
                ("P", s.pick([f"I am {s.number(x['age'])}.", f"{capital(s.number(x['age']))} years old."])),
            ],
            [("P", f"I am {article(x['sex'])} of {s.number(x['age'])}, you know, things start to break.")],
            [
                ("D", f"You are {article(x['sex'])} of what age?"),
                ("P", f"{capital(s.number(x['age']))}, last {s.pick(MONTHS)}."),
            ],
        ]
    )


def note_age(x):
    return f"{x['age']}-year-old {x['sex']}."


def back_age(x):
    return f"you are a {x['age']}-year-old {x['sex']}"


def ask_age(x):
    return [("How old is the patient?", str(x["age"])), ("Man or woman?", x["sex"])]


def draw_cause(s):
    return {"how": s.pick(CAUSES)}


def tell_cause(s, x):
    return [
        ("D", s.pick(["Did something happen?", "How did it start?", "Do you know what caused it?"])),
        ("P", s.pick([f"Yes, {x['how']}.", f"{capital(x['how'])}.", f"Well, {x['how']}."])),
    ]


def note_cause(x):
    return f"Began after {CAUSES[x['how']]}."


def back_cause(x):
    return f"it began after {CAUSES[x['how']]}"


def ask_cause(x):
    return [("What caused it?", CAUSES[x["how"]])]


def draw_modifiers(s):
    return {"worse": s.pick(WORSE), "better": s.pick(BETTER)}


def tell_modifiers(s, x):
    if s.chance(0.5):
        return [
            ("D", s.pick(["What makes it worse?", "When is it at its worst?"])),
            ("P", s.pick([f"{capital(x['worse'])}.", f"Mostly {x['worse']}."])),
            ("D", s.pick(["And what helps?", "Does anything make it better?"])),
            ("P", s.pick([f"{capital(x['better'])} helps a little.", f"{capital(x['better'])}."])),
        ]
    return [
        ("D", s.pick(["Does anything change it?", "What makes it better or worse?"])),
        (
            "P",
            s.pick(
                [
                    f"{capital(x['better'])} helps, {x['worse']} makes it worse.",
                    f"It is bad with {x['worse']}. I feel better with {x['better']}.",
                ]
            ),
        ),
    ]


def note_modifiers(x):
    return f"Worse with {x['worse']}, better with {x['better']}."


def back_modifiers(x):
    return f"it is worse with {x['worse']} and better with {x['better']}"


def ask_modifiers(x):
    return [("What makes it worse?", x["worse"]), ("What makes it better?", x["better"])]


def draw_severity(s):
    return {"score": s.rng.randint(2, 10)}


def tell_severity(s, x):
    return [
        ("D", s.pick(["How bad is it, from one to ten?", "On a scale of one to ten?"])),
        ("P", s.pick([f"{capital(s.number(x['score']))}.", f"I would say {s.number(x['score'])}."])),
    ]


def note_severity(x):
    return f"Rated {x['score']} out of 10."


def back_severity(x):
    return f"you rate it {x['score']} out of 10"


def ask_severity(x):
    return [("How bad is it?", f"{x['score']} out of 10")]


def draw_review(s):
    items = s.rng.sample(REVIEW, s.rng.randint(2, 5))
    yes = min(s.rng.choice([0, 0, 1, 1, 2]), len(items) - 1)
    return {"yes": items[:yes], "no": items[yes:]}


def tell_review(s, x):
    items, turns = [(i, True) for i in x["yes"]] + [(i, False) for i in x["no"]], []
    s.rng.shuffle(items)
    if all(not present for _, present in items) and s.chance(0.5):
        return [
            ("D", f"Any {listed(i for i, _ in items).replace(' and ', ' or ')}?"),
            ("P", s.pick(["No.", "No, none of that.", "Nothing like that."])),
        ]
    for item, present in items:
        asked = s.pick([f"Any {item}?", f"Have you had {item}?", f"What about {item}?", f"{capital(item)}?"])
        said = (
            s.pick(["Yes.", "Yes, I have.", f"Yes, some {item}.", "Yeah, quite a bit."])
            if present
            else s.pick(["No.", "No, none.", "Not that I noticed.", "Nope."])
        )
        turns += [("D", asked), ("P", said)]
    return turns


def note_review(x):
    parts = [f"Positive for {listed(x['yes'])}."] if x["yes"] else []
    return " ".join([*parts, f"Negative for {listed(x['no'])}."])


def back_review(x):
    parts = [f"you have {listed(x['yes'])}"] if x["yes"] else []
    return " and ".join([*parts, f"you do not have {listed(x['no'])}"])


def ask_review(x):
    return [(f"Is there {item}?", "yes") for item in x["yes"]] + [(f"Is there {item}?", "no") for item in x["no"]]


def draw_smoking(s):
    kind = s.pick(["never", "now", "quit"])
    return {"kind": kind, "packs": s.rng.randint(1, 3), "years": s.rng.randint(2, 45)}


def tell_smoking(s, x):
    asked = s.pick(["Do you smoke?", "What about cigarettes?", "Any tobacco?"])
    packs, years = s.count(x["packs"], "pack"), s.count(x["years"], "year")
    if x["kind"] == "never":
        return [("D", asked), ("P", s.pick(["No, never.", "I have never smoked.", "No, I hate the smell."]))]
    if x["kind"] == "quit":
        return [
            ("D", asked),
            (
                "P",
                s.pick(
                    [
                        f"I quit {years} ago.",
                        f"Not anymore. I stopped {years} ago.",
                        f"I used to, but I gave it up {years} ago.",
                    ]
                ),
            ),
        ]
    if s.chance(0.4):
        return [
            ("D", asked),
            ("P", f"Yes, {packs} a day."),
            ("D", "For how long?"),
            ("P", s.pick([f"{capital(years)}.", f"About {years}."])),
        ]
    return [
        ("D", asked),
        (
            "P",
            s.pick([f"Yes, {packs} a day for {years}.", f"{capital(packs)} a day. I have done that for {years}."]),
        ),
    ]


def note_smoking(x):
    return {
        "never": "Never smoked.",
        "now": f"Smokes {plural(x['packs'], 'pack')} a day for {plural(x['years'], 'year')}.",
        "quit": f"Quit smoking {plural(x['years'], 'year')} ago.",
    }[x["kind"]]


def back_smoking(x):
    return {
        "never": "you never smoked",
        "now": f"you smoke {plural(x['packs'], 'pack')} a day, for {plural(x['years'], 'year')} now",
        "quit": f"you quit smoking {plural(x['years'], 'year')} ago",
    }[x["kind"]]


def ask_smoking(x):
    if x["kind"] == "now":
        return [
            ("How much is smoked?", f"{plural(x['packs'], 'pack')} a day"),
            ("How many years of smoking?", str(x["years"])),
        ]
    return [
        (
            "Does the patient smoke?",
            "no, never" if x["kind"] == "never" else f"quit {plural(x['years'], 'year')} ago",
        )
    ]


def draw_alcohol(s):
    return {
        "n": s.pick([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12]),
        "what": s.pick(["beer", "glass of wine", "drink", "whiskey", "cocktail"]),
    }


def _drinks(x):
    n, what = x["n"], x["what"]
    return f"{n} {what}" if n == 1 else f"{n} {what.replace('glass', 'glasses') if 'glass' in what else what + 's'}"


def tell_alcohol(s, x):
    asked = s.pick(["How about alcohol?", "Do you drink?", "Any alcohol?"])
    if not x["n"]:
        return [("D", asked), ("P", s.pick(["No, not at all.", "I do not drink.", "Never touch it."]))]
    number = s.number(x["n"])
    amount = _drinks(x).replace(str(x["n"]), number, 1)
    return [
        ("D", asked),
        (
            "P",
            s.pick(
                [
                    f"About {amount} a week.",
                    f"{capital(amount)} a week, not more.",
                    f"Maybe {amount} each week.",
                ]
            ),
        ),
    ]


def note_alcohol(x):
    return f"Drinks {_drinks(x)} a week." if x["n"] else "Does not drink."


def back_alcohol(x):
    return f"you drink {_drinks(x)} a week" if x["n"] else "you do not drink"


def ask_alcohol(x):
    return [("How much alcohol?", f"{_drinks(x)} a week" if x["n"] else "none")]


def draw_job(s):
    return {"job": s.entity(JOBS), "retired": s.chance(0.3)}


def tell_job(s, x):
    job = article(x["job"])
    asked = s.pick(["What do you do for a living?", "Where do you work?", "And your job?", "Are you working?"])
    said = (
        [f"I am retired. I was {job}.", f"I used to be {job}, I am retired now."]
        if x["retired"]
        else [f"I am {job}.", f"I work as {job}.", f"{capital(job)}, I love it."]
    )
    return [("D", asked), ("P", s.pick(said))]


def note_job(x):
    return f"Retired {x['job']}." if x["retired"] else f"Works as {article(x['job'])}."


def back_job(x):
    return f"you are a retired {x['job']}" if x["retired"] else f"you work as {article(x['job'])}"


def ask_job(x):
    return [("What is the job?", x["job"]), ("Retired or working?", "retired" if x["retired"] else "working")]


def draw_home(s):
    return {"status": s.pick(["married", "divorced", "single", "widowed"]), "children": s.rng.randint(0, 6)}


def tell_home(s, x):
    children = {0: "no children", 1: f"{s.pick(['one', 'a', '1'])} child"}.get(
        x["children"], f"{s.number(x['children'])} children"
    )
    return [
        (
            "D",
            s.pick(["Tell me about your family at home.", "Are you married? Children?", "Who is at home?"]),
        ),
        (
            "P",
            s.pick(
                [
                    f"I am {x['status']}, with {children}.",
                    f"{capital(x['status'])}. I have {children}.",
                    f"I have {children} and I am {x['status']}.",
                ]
            ),
        ),
    ]


def note_home(x):
    children = {0: "no children", 1: "1 child"}.get(x["children"], f"{x['children']} children")
    return f"{capital(x['status'])} with {children}."


def back_home(x):
    return f"you are {note_home(x)[:-1].lower()}"


def ask_home(x):
    return [
        ("Married, divorced, single or widowed?", x["status"]),
        ("How many children?", str(x["children"])),
    ]


def draw_family(s):
    return {"who": s.pick(RELATIVES), "what": s.pick(DISEASES), "age": s.rng.randint(30, 90)}


def tell_family(s, x):
    asked = s.pick(
        [
            "Does anything run in the family?",
            "Any illness in your family?",
            "How about your parents and relatives?",
        ]
    )
    age = s.number(x["age"])
    return [
        ("D", asked),
        (
            "P",
            s.pick(
                [
                    f"My {x['who']} had {x['what']} at {age}.",
                    f"My {x['who']} got {x['what']} when {'she' if x['who'] in ('mother', 'sister', 'grandmother', 'aunt', 'daughter') else 'he'} was {age}.",
                    f"{capital(x['what'])}, my {x['who']}, at age {age}.",
                ]
            ),
        ),
    ]


def note_family(x):
    return f"{capital(x['who'])} had {DISEASES[x['what']]} at age {x['age']}."


def back_family(x):
    return f"your {x['who']} had {DISEASES[x['what']]} at age {x['age']}"


def ask_family(x):
    return [
        ("Which relative was ill?", x["who"]),
        (f"What did the {x['who']} have?", DISEASES[x["what"]]),
        (f"At what age was the {x['who']} ill?", str(x["age"])),
    ]


def draw_disease(s):
    return {"what": s.pick(DISEASES), "year": s.rng.randint(1975, 2024)}


def tell_disease(s, x):
    year = s.number(x["year"])
    asked = s.pick(
        [
            "Do you have any medical problems?",
            "What about your own health, any conditions?",
            "Any illnesses in the past?",
            "What have you been diagnosed with?",
        ]
    )
    if s.chance(0.3):
        return [
            ("D", asked),
            ("P", f"I have {x['what']}."),
            ("D", "Since when?"),
            ("P", s.pick([f"{capital(year)}.", f"They found it in {year}."])),
        ]
    return [
        ("D", asked),
        (
            "P",
            s.pick(
                [
                    f"I have had {x['what']} since {year}.",
                    f"They told me I had {x['what']} in {year}.",
                    f"{capital(x['what'])}, that was in {year}.",
                ]
            ),
        ),
    ]


def note_disease(x):
    return f"{capital(DISEASES[x['what']])} since {x['year']}."


def back_disease(x):
    return f"you have had {DISEASES[x['what']]} since {x['year']}"


def ask_disease(x):
    return [
        ("What is the diagnosis?", DISEASES[x["what"]]),
        (f"Since when {DISEASES[x['what']]}?", str(x["year"])),
    ]


def draw_surgery(s):
    return {"what": s.pick(SURGERIES), "side": s.pick(["left", "right"]), "year": s.rng.randint(1970, 2024)}


def tell_surgery(s, x):
    what, year = x["what"].format(side=x["side"]), s.number(x["year"])
    asked = s.pick(
        [
            "Have you had any surgeries?",
            "Any operations?",
            "Were you ever operated on?",
            "What surgeries have you had?",
        ]
    )
    if s.chance(0.3):
        return [
            ("D", asked),
            ("P", f"I had {what}."),
            ("D", s.pick(["What year was that?", "When?"])),
            ("P", s.pick([f"In {year}.", f"{capital(year)}, I think."])),
        ]
    return [
        ("D", asked),
        (
            "P",
            s.pick([f"I had {what} in {year}.", f"In {year} I had {what}.", f"Yes, {what}. That was {year}."]),
        ),
    ]


def note_surgery(x):
    return f"{capital(SURGERIES[x['what']].format(side=x['side']))} in {x['year']}."


def back_surgery(x):
    return f"you had {article(SURGERIES[x['what']].format(side=x['side']))} in {x['year']}"


def ask_surgery(x):
    name = SURGERIES[x["what"]].format(side=x["side"])
    return [("What surgery was done?", name), (f"What year was the {name}?", str(x["year"]))]


def draw_vaccine(s):
    return {"which": s.pick(VACCINES), "month": s.pick(MONTHS), "got": s.chance(0.75)}


def tell_vaccine(s, x):
    asked = s.pick(
        [
            f"Have you had the {x['which']} shot?",
            f"What about the {x['which']} vaccine?",
            f"When was your {x['which']} shot?",
        ]
    )
    return [
        ("D", asked),
        (
            "P",
            s.pick([f"Yes, in {x['month']}.", f"I got it in {x['month']}.", f"{x['month']}, at the pharmacy."])
            if x["got"]
            else s.pick(["No, I never got it.", "I do not want it.", "Not yet."]),
        ),
    ]


def note_vaccine(x):
    return f"{capital(VACCINES[x['which']])} vaccine {'in ' + x['month'] if x['got'] else 'not given'}."


def back_vaccine(x):
    return (
        f"you had the {VACCINES[x['which']]} vaccine in {x['month']}"
        if x["got"]
        else f"you did not have the {VACCINES[x['which']]} vaccine"
    )


def ask_vaccine(x):
    return [(f"When was the {VACCINES[x['which']]} vaccine?", x["month"] if x["got"] else "not given")]


def draw_order(s):
    return {
        "drug": s.entity(DRUGS),
        "dose": s.pick(DOSES),
        "often": s.pick([f for f in FREQUENCIES if " I " not in f]),
    }


def tell_order(s, x):
    dose = s.number(x["dose"])
    said = s.pick(
        [
            f"I would like you to start {x['drug']}, {dose} milligrams, {x['often']}.",
            f"Let us try {dose} milligrams of {x['drug']} {x['often']}.",
            f"I am going to prescribe {x['drug']}. Take {dose} milligrams {x['often']}.",
        ]
    )
    return [("D", said), ("P", s.pick(["Okay.", "All right.", "I can do that.", "Will it make me sleepy?"]))]


def note_order(x):
    return f"Start {x['drug']} {x['dose']} mg {FREQUENCIES[x['often']]}."


def back_order(x):
    return f"you start {x['drug']} {x['dose']} mg {FREQUENCIES[x['often']]}"


def ask_order(x):
    return [
        ("Which medicine is started?", x["drug"]),
        (f"What is the dose of {x['drug']}?", f"{x['dose']} mg"),
    ]


def draw_return(s):
    return {"n": s.rng.randint(1, 9), "unit": s.pick(["week", "month", "day"]), "who": s.entity(SURNAMES)}


def tell_return(s, x):
    when = s.count(x["n"], x["unit"])
    return [
        (
            "D",
            s.pick(
                [
                    f"Come back in {when} to see Doctor {x['who']}.",
                    f"Doctor {x['who']} will see you again in {when}.",
                    f"I want you to see Doctor {x['who']} in {when}.",
                ]
            ),
        ),
        ("P", s.pick(["Sure.", "I will.", "Thank you, doctor.", "I will make the appointment."])),
    ]


def note_return(x):
    return f"Follow up with Dr. {x['who']} in {plural(x['n'], x['unit'])}."


def back_return(x):
    return f"you see Dr. {x['who']} in {plural(x['n'], x['unit'])}"


def ask_return(x):
    return [
        ("Who will be seen?", f"Dr. {x['who']}"),
        ("When is the next visit?", f"in {plural(x['n'], x['unit'])}"),
    ]


NAMES = "medicine stopped allergy pain symptom age cause modifiers severity review smoking alcohol job home family disease surgery vaccine order return".split()
KINDS = {name: tuple(globals()[f"{verb}_{name}"] for verb in ("draw", "tell", "note", "back", "ask")) for name in NAMES}
# section: (weight, kinds that may occur, fewest, most, share of "nothing to report", its questions, its stock note)
SECTIONS = {
    "FAM/SOCHX": (
        27,
        ["smoking", "alcohol", "job", "home", "family"],
        1,
        4,
        0.06,
        ["Anything in your family, or habits I should know of?", "Any family history?"],
        "Noncontributory.",
    ),
    "GENHX": (23, ["age", "pain|symptom", "cause", "modifiers", "severity"], 2, 4, 0.0, [], ""),
    "PASTMEDICALHX": (
        11,
        ["disease"],
        1,
        3,
        0.15,
        ["Any medical problems?", "Do you have any health conditions?", "Were you ever seriously ill?"],
        "Noncontributory.",
    ),
    "CC": (8, ["pain|symptom"], 1, 1, 0.0, [], ""),
    "PASTSURGICAL": (
        7,
        ["surgery"],
        1,
        2,
        0.25,
        ["Any surgeries?", "Have you ever been operated on?", "Any operations in the past?"],
        "None.",
    ),
    "ALLERGY": (
        7,
        ["allergy"],
        1,
        2,
        0.3,
        ["Any allergies?", "Are you allergic to any medicine?", "Does any drug give you trouble?"],
        "No known drug allergies.",
    ),
    "ROS": (
        6,
        ["review"],
        1,
        1,
        0.08,
        ["Any other symptoms at all?", "Anything else, from head to toe?"],
        "Otherwise negative.",
    ),
    "MEDICATIONS": (
        7,
        ["medicine", "stopped"],
        1,
        3,
        0.15,
        ["Do you take any medicines?", "Are you on any medication?", "Any pills or supplements?"],
        "None.",
    ),
    "IMMUNIZATIONS": (2, ["vaccine"], 1, 2, 0.0, [], ""),
    "PLAN": (4, ["order", "return"], 1, 2, 0.0, [], ""),
}
NOTHING = [
    "No.",
    "No, nothing.",
    "None at all.",
    "Not that I know of.",
    "No, I have been lucky.",
    "Nope, nothing.",
]
GREETINGS = [
    "Good morning.",
    "Good afternoon.",
    "Hi there!",
    "Hello, come in.",
    "Nice to see you again.",
    "Hello, have a seat.",
]
REPLIES = ["Hi, doctor.", "Good morning.", "Hello.", "Thanks for seeing me.", "Hi.", "Nice to see you too."]
SMALL_TALK = [
    [("D", "Did you find parking?"), ("P", "It took a while, but yes.")],
    [("D", "How was the drive?"), ("P", "Long. The traffic was terrible.")],
    [("P", "It is so cold in here."), ("D", "I will turn up the heat.")],
    [("D", "How are the grandkids?"), ("P", "Growing like weeds.")],
    [("P", "I almost forgot the appointment."), ("D", "I am glad you made it.")],
    [("D", "Crazy weather, right?"), ("P", "I know, all this rain.")],
    [("D", "Did you watch the game?"), ("P", "Do not remind me.")],
    [("P", "Sorry that I am late."), ("D", "No problem at all.")],
]
CLOSINGS = [
    [("D", "Okay, thank you.")],
    [("D", "Got it.")],
    [("D", "Good to know."), ("P", "Sure.")],
    [("D", "Let me write that down.")],
    [("D", "All right, let us take a look.")],
    [("P", "Is that bad?"), ("D", "We will see.")],
    [("D", "Thanks, that helps.")],
]
FILLERS = ["Um, ", "Well, ", "Let me think. ", "Uh, ", "Oh, ", "Hmm, ", "Yeah, so, "]
LABELS = {"D": "Doctor", "P": "Patient", "F": "Guest_family"}


def visit(s: Speech, section: str | None = None) -> dict:
    """One talk's content: its section and facts [(kind, slots)]; no facts means that there is nothing to report."""
    section = section or s.rng.choices(list(SECTIONS), [v[0] for v in SECTIONS.values()])[0]
    _, kinds, least, most, nothing, _, _ = SECTIONS[section]
    if s.chance(nothing):
        return {"section": section, "facts": []}
    n = s.rng.randint(least, most)
    if len(kinds) >= n and len(kinds) > 2:
        chosen = sorted(s.rng.sample(range(len(kinds)), n))
        if section == "GENHX" and 1 not in chosen:
            chosen = sorted({1, *chosen[1:]})  # a history has a complaint
        names = [kinds[i] for i in chosen]
    elif section == "PLAN":
        names = kinds[:n] if n == 2 else [s.pick(kinds)]
    else:
        names = sorted((s.pick(kinds) for _ in range(n)), key=kinds.index)
    facts = []
    for name in names:
        name = s.pick(name.split("|"))
        slots = KINDS[name][0](s)
        while any(other == name and list(known.values())[0] == list(slots.values())[0] for other, known in facts):
            slots = KINDS[name][0](s)
        facts.append((name, slots))
    return {"section": section, "facts": facts}


def correct(s: Speech, turns: list, name: str, slots: dict) -> list:
    """The patient first says something else and then corrects it: "..., no, wait, ..."; the last word counts."""
    if name not in ("pain", "symptom", "disease", "surgery", "medicine", "allergy"):
        return turns
    wrong = dict(slots)
    changed = {
        "pain": "side",
        "symptom": "what",
        "disease": "year",
        "surgery": "year",
        "medicine": "dose",
        "allergy": "to",
    }[name]
    while wrong[changed] == slots[changed]:
        wrong[changed] = KINDS[name][0](s)[changed]
    first = KINDS[name][1](s, wrong)
    if len(first) != 2:
        return turns
    again = next(t for t in iter(lambda: KINDS[name][1](s, slots), None) if len(t) == 2)
    if s.chance(0.3):
        return [
            *first,
            ("F", s.pick(["No, that is not right.", "That is wrong, dear.", "You mix that up again."])),
            ("P", f"{s.pick(FILLERS)}{again[1][1]}"),
        ]
    return [
        first[0],
        (
            "P",
            f"{first[1][1]} {s.pick(['No, wait.', 'Sorry, I mean,', 'No, that is wrong.', 'Let me correct that.'])} {again[1][1]}",
        ),
    ]


def talk(s: Speech, v: dict, shuffle: bool = True) -> str:
    """A dialogue that tells the facts of a visit, "Doctor: ...\\nPatient: ..."; another one at every call."""
    turns = []
    if s.chance(0.35):
        turns.append(("D", s.pick(GREETINGS)))
        if s.chance(0.6):
            turns.append(("P", s.pick(REPLIES)))
        if s.chance(0.4):
            turns += s.pick(SMALL_TALK)
    if not v["facts"]:
        turns += [("D", s.pick(SECTIONS[v["section"]][5])), ("P", s.pick(NOTHING))]
    facts, asked = list(v["facts"]), set()
    if shuffle and s.chance(0.3):  # who and what comes before how it began, what changes it and how bad it is
        first = [f for f in facts if f[0] in ("age", "pain", "symptom")]
        rest = [f for f in facts if f not in first]
        s.rng.shuffle(first)
        s.rng.shuffle(rest)
        facts = first + rest
    for name, slots in facts:
        told = KINDS[name][1](s, slots)
        if name in asked and len(told) == 2 and told[0][0] == "D" and name not in ("stopped", "vaccine"):
            told[0] = ("D", s.pick(["Anything else?", "What else?", "Any others?", "And apart from that?"]))
        asked.add(name)
        if s.chance(0.08):
            told = correct(s, told, name, slots)
        if s.chance(0.25):
            place = next((i for i, (who, _) in enumerate(told) if who == "P"), None)
            if place is not None:
                filler, text = s.pick(FILLERS), told[place][1]
                keep = text.startswith("I ") or text.split(" ")[0] in (*MONTHS, *DAYS) or filler.endswith(". ")
                told[place] = ("P", filler + (text if keep else text[:1].lower() + text[1:]))
        turns += told
        if s.chance(0.05) and told[-1][0] == "P":
            turns.append(("F", s.pick(["That is right.", "I can confirm that.", "That is what I remember too."])))
        if s.chance(0.1):
            turns += s.pick(SMALL_TALK)
    if s.chance(0.15) and v["section"] in ("MEDICATIONS", "ALLERGY", "PASTSURGICAL"):
        who, other = s.pick(["wife", "husband", "sister", "neighbor"]), s.entity(DRUGS)
        turns += [("P", f"My {who} takes {other}, but I do not."), ("D", "I see.")]
    if s.chance(0.5):
        turns += s.pick(CLOSINGS)
    merged = []
    for who, text in turns:
        if merged and merged[-1][0] == who:
            merged[-1] = (who, f"{merged[-1][1]} {text}")
        else:
            merged.append((who, text))
    return "\n".join(f"{LABELS[who]}: {text}" for who, text in merged)


def note(v: dict) -> str:
    """The section's text in the note: the facts in their fixed order, whatever the order of the talk."""
    return " ".join(KINDS[name][2](slots) for name, slots in v["facts"]) or SECTIONS[v["section"]][6]


def rows(split: str, seed: int = SEED) -> list[dict]:
    """The rows of a split; no two dialogues are the same, within or across splits."""
    s, found, taken = Speech(random.Random(f"{seed}-{split}"), split), [], set()
    for other in ROWS:
        if other == split:
            break
        taken |= {row["dialogue"].lower() for row in rows(other, seed)}
    while len(found) < ROWS[split]:
        v = visit(s)
        dialogue = talk(s, v)
        if dialogue.lower() not in taken:
            taken.add(dialogue.lower())
            found.append(
                {
                    "ID": len(found),
                    "section_header": v["section"],
                    "section_text": note(v),
                    "dialogue": dialogue,
                }
            )
    return found


def write(folder: Path):
    for split in ROWS:
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["ID", "section_header", "section_text", "dialogue"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows(split))


if __name__ == "__main__":
    write(Path(__file__).parent)
