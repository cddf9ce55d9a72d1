"""Damage: every file of a run, of an evaluation and of data/processed, changed in seven ways.

Each time the damage is noticed, the file is named, nothing of it is used, and nothing is deleted.
"""

import re
import shutil

import pytest

from src import data, recipes, runs, scoring, verify
from src.runs import Damage, RunError, files
from tests.test_runs import fast, finish, opened, prepared, scored  # noqa: F401  two of them are fixtures

RUN = """adapter/adapter_config.json adapter/adapter_model.safetensors adapter/chat_template.jinja
    adapter/prompt_template.json adapter/tokenizer.json adapter/tokenizer_config.json config.json manifest.json
    train_log.jsonl""".split()
EVALUATION = "evaluation.json metrics.json predictions/base.jsonl predictions/finetuned.jsonl".split()
CHECKPOINT = """adapter_config.json adapter_model.safetensors checksums.json optimizer.pt rng_state.pth scheduler.pt
    tokenizer.json trainer_state.json training_args.bin""".split()
COMPARISON = "comparison.json comparison/scores.csv comparison/scores.png ../../adapter/README.md".split()  # by 04
PROCESSED = "leaks.json report.json test.jsonl train.jsonl validation.jsonl".split()
ANSWER = {"tokens": 2, "stop": "eos", "prompt_tokens": 9, "cut_tokens": 0}


def truncate(path, other):
    path.write_bytes(path.read_bytes()[: -max(1, path.stat().st_size // 3)])


def append(path, other):
    path.write_bytes(path.read_bytes() + b"\n{}\n")


def flip(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path, other):
    path.write_bytes(b"")


def delete(path, other):
    path.unlink()


def swap(path, other):
    """Another run's file of this name; where that is equal, another file of this folder."""
    beside = [other, *sorted(path.parent.iterdir())]
    shutil.copy(next(p for p in beside if p.is_file() and p.read_bytes() != path.read_bytes()), path)


def edit(path, other):
    """Another number, as valid as before; where a file has none, one in a list."""
    changed = re.sub(rb"\d", lambda digit: b"%d" % ((int(digit[0]) + 1) % 10), path.read_bytes(), count=1)
    changed = changed.replace(b"[]", b"[1]", changed == path.read_bytes())
    assert path.suffix in (".json", ".jsonl") and changed != path.read_bytes()
    path.write_bytes(changed)


KINDS = (truncate, append, flip, empty, delete, swap, edit)


def cases(names):
    """Every file in every way, but numbers in what is no JSON."""
    return [
        pytest.param(name, kind, id=f"{kind.__name__} {name}")
        for name in names
        for kind in KINDS
        if kind is not edit or ".json" in name
    ]


def answer(evaluation, count=4, words="they meet"):
    """Keep made-up answers of both systems and save them, as 03 does. Returns the evaluation's records."""
    records = list(data.evaluation_rows(evaluation.run.recipe()))[:count]
    for system in ("base", "finetuned"):
        texts = [f"{system} says {words} at {n}" for n in range(len(records))]
        found = {n: {"id": r["id"], "prediction": texts[n], **ANSWER} for n, r in enumerate(records)}
        evaluation.keep(system).add(found)
    return records


@pytest.fixture(scope="module")
def made(prepared, tmp_path_factory):  # noqa: F811
    """Two trained and scored runs of other seeds, an unfinished one with checkpoints, and other prepared rows."""
    folder = tmp_path_factory.mktemp("made") / "repository"
    shutil.copytree(prepared, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "ROOT", folder)
        patch.chdir(folder)
        found = {}
        for name, seed in {"one": 1, "other": 2}.items():
            run = finish(opened({"seed": seed, "training.keep_checkpoints": name == "one"}), train=name == "one")
            evaluation = scored(run)
            records = answer(evaluation, words=name)
            predictions = evaluation.save_predictions(records)
            texts = {system: [row["prediction"] for row in rows] for system, rows in predictions.items()}
            evaluation.save_metrics({"split": "test", **scoring.evaluate(records, texts, set(), seed)})
            for file in COMPARISON[1:]:
                runs.write_atomic(evaluation.folder / file, f"{name} {file}, 12 rows\n")
            evaluation.seal_comparison()
            found[name] = evaluation
        open_one = scored(found["one"].run, {"generation.max_new_tokens": 3})
        answer(open_one)
        open_one.run.unlock()
        runs.locks.release(open_one.folder)
        found["unfinished"] = open_one
        more = shutil.copytree(folder / "data" / "processed" / "demo", folder / "data" / "processed" / "other")
        rows = runs.read_jsonl(more / "train.jsonl", "01")
        for split in ("train", "validation", "test"):
            runs.write_jsonl(more / f"{split}.jsonl", rows[1:])
        runs.write_json(more / "leaks.json", {})
        report = files.read_sealed(more / "report.json", "01") | {"dataset": "custom"}
        report["processed"] = {
            n: runs.sha256_file(more / f"{n}.json{'' if n == 'leaks' else 'l'}") for n in report["processed"]
        }
        files.write_sealed(more / "report.json", report)
    return folder, found


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """A copy of `made` that a test may damage: {"one": evaluation, ...}."""
    folder, found = made
    monkeypatch.setattr(runs, "ROOT", shutil.copytree(folder, tmp_path / "repository", copy_function=shutil.copy))
    monkeypatch.chdir(runs.ROOT)
    yield found
    for evaluation in found.values():
        runs.locks.release(evaluation.folder)
        evaluation.run.unlock()


def damaged(path, kind, other):
    """Damage a file. Returns what it holds now, None where it is gone."""
    kind(path, other)
    return path.read_bytes() if path.exists() else None


def kept(content, name):
    """True where a folder or file that was set aside holds the damaged file, unless it was deleted."""
    if content is None:
        return True
    aside = [path for path in runs.ROOT.rglob(f"*{name.rpartition('/')[2]}*") if ".damaged-" in str(path)]
    return any(path.read_bytes() == content for path in aside if path.is_file())


def told(capsys, act):
    """What `act` raised or printed."""
    try:
        act()
        raised = ""
    except (RunError, data.DataError, FileNotFoundError) as error:
        raised = str(error)
    return raised + capsys.readouterr().out


def test_the_tables_here_are_whole(copy):
    one, run = copy["one"], copy["one"].run

    def names(folder):
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    own = [name for name in names(run.folder) if not name.startswith((".", "evaluations", "checkpoints"))]
    assert own == sorted([*RUN, "adapter/README.md"]) and names(runs.ROOT / "data" / "processed" / "demo") == sorted(
        PROCESSED
    )
    assert sorted(set(names(one.folder)) - {".opened"}) == sorted(EVALUATION + COMPARISON[:3])
    newest = run.checkpoints / "checkpoint-2"
    assert set(CHECKPOINT) <= set(names(newest)) and set(
        files.read_sealed(newest / "checksums.json", "")["sha256"]
    ) == {name for name in names(newest) if name != "checksums.json"}
    assert len(cases(RUN) + cases(EVALUATION) + cases(CHECKPOINT) + cases(PROCESSED)) >= 150


def test_what_is_whole_is_used_and_verified(copy, capsys):
    one = copy["one"]
    assert runs.find("demo", one.run.name) == one.run and runs.find_evaluation(one.run, one.name) == one
    assert one.run.checkpoint().endswith("checkpoint-2") and len(copy["unfinished"].keep("base").found) == 4
    assert data.load_split(recipes.load("demo"), "test")
    capsys.readouterr()
    assert verify.main(["all"]) == 0
    said = capsys.readouterr().out
    assert said.count("as it was written") == 2 and "1 evaluation(s)" in said
    assert verify.main(["nothing"]) == 1 and "No run 'nothing'" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), cases(RUN))
def test_a_damaged_file_of_a_run_is_named_and_the_run_set_aside(copy, capsys, name, kind):
    run = copy["one"].run
    content = damaged(run.folder / name, kind, copy["other"].run.folder / name)
    assert verify.main([run.name]) == 1
    assert name in capsys.readouterr().out
    said = told(capsys, lambda: runs.find("demo", run.name))
    assert name in said if (name, kind) != ("manifest.json", delete) else "No finished run named" in said
    with pytest.raises(RunError):
        runs.find("demo", run.name)
    assert kept(content, name) and runs.find("demo") == copy["other"].run


@pytest.mark.parametrize(("name", "kind"), cases(EVALUATION))
def test_a_damaged_file_of_an_evaluation_is_named_and_the_evaluation_set_aside(copy, capsys, name, kind):
    one = copy["one"]
    content = damaged(one.folder / name, kind, copy["other"].folder / name)
    said = told(capsys, lambda: verify.main([one.run.name]))
    assert name in said and "difference(s)" in said or (name, kind) == ("metrics.json", delete)
    said = told(capsys, lambda: runs.find_evaluation(one.run, one.name))
    assert name in said if (name, kind) != ("metrics.json", delete) else "has no evaluation named" in said
    with pytest.raises(RunError, match="has no evaluation named"):
        runs.find_evaluation(one.run, one.name)
    assert kept(content, name) and runs.find("demo", one.run.name) == one.run


@pytest.mark.parametrize(("name", "kind"), cases(COMPARISON))
def test_damaged_tables_figures_and_cards_are_named(copy, capsys, name, kind):
    one = copy["one"]
    damaged(one.folder / name, kind, copy["other"].folder / name)
    assert verify.main([one.run.name]) == 1
    said = capsys.readouterr().out
    assert name.removeprefix("../../") in said and "1 difference(s)" in said
    assert verify.main([copy["other"].run.name]) == 0


def test_a_card_is_that_of_the_evaluation_that_04_looked_at_last(copy, capsys):
    one, other = copy["one"], copy["unfinished"]
    other.save_predictions(list(data.evaluation_rows(one.run.recipe())))
    other.save_metrics({"split": "test", **one.metrics})
    runs.write_atomic(other.comparison / "scores.csv", "a\n")
    runs.write_atomic(one.run.adapter / "README.md", "of the other evaluation\n")
    other.seal_comparison()
    found = list(verify.comparison_differences(one.run, [one, other]))
    assert found == [] and len(list(verify.comparison_differences(one.run, [one]))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_answers_of_a_stopped_evaluation_are_named_and_generated_again(copy, capsys, kind):
    path = copy["unfinished"].folder / ".answers-base.json"
    content = damaged(path, kind, path.with_name(".answers-finetuned.json"))
    said = told(capsys, lambda: copy["unfinished"].keep("base"))
    assert copy["unfinished"].keep("base").found == {} and kept(content, path.name)
    assert path.name in said or kind is delete
    assert len(copy["unfinished"].keep("finetuned").found) == 4


@pytest.mark.parametrize(("name", "kind"), cases(CHECKPOINT))
def test_a_damaged_checkpoint_is_named_and_training_goes_on_from_the_one_before(copy, capsys, name, kind):
    run = copy["one"].run
    newest = run.checkpoints / "checkpoint-2"
    content = damaged(newest / name, kind, run.checkpoints / "checkpoint-1" / name)
    said = told(capsys, run.checkpoint)
    assert name in said and ("removed" if kind is delete else "set aside") in said
    assert not newest.exists() and kept(content, name)
    assert run.checkpoint().endswith("checkpoint-1")


@pytest.mark.parametrize(("name", "kind"), cases(PROCESSED))
def test_damaged_rows_are_named_and_set_aside(copy, capsys, name, kind):
    folder = runs.ROOT / "data" / "processed"
    content = damaged(folder / "demo" / name, kind, folder / "other" / name)
    said = told(capsys, lambda: verify.main([copy["one"].run.name]))
    assert name in said or (name, kind) in (("report.json", delete), ("report.json", swap))
    said = told(capsys, lambda: data.load_split(recipes.load("demo"), "train"))
    assert name in said or (name, kind) == ("report.json", swap) and "is not the file that 01 wrote" in said
    with pytest.raises((RunError, data.DataError, FileNotFoundError)):
        data.load_split(recipes.load("demo"), "train")
    assert kept(content, name) or (name, kind) == ("report.json", swap)


def test_a_whole_folder_under_another_name_is_noticed(copy, capsys):
    one, other = copy["one"], copy["other"]
    shutil.rmtree(one.folder)
    shutil.copytree(other.folder, one.folder)
    with pytest.raises(Damage, match=f"of run {other.run.name}|of evaluation"):
        runs.find_evaluation(one.run, one.name)
    shutil.rmtree(one.run.folder)
    shutil.copytree(other.run.folder, one.run.folder)
    assert verify.main([one.run.name]) == 1 and other.run.name in capsys.readouterr().out
    with pytest.raises(Damage, match=f"manifest.json is of run {other.run.name}, expected {one.run.name}"):
        runs.find("demo", one.run.name)


@pytest.mark.parametrize("what", ["score", "answer", "reference"])
def test_scores_that_the_predictions_do_not_have_are_told_even_where_every_hash_was_made_anew(copy, capsys, what):
    one = copy["one"]
    metrics, path = one.metrics, one.folder / "predictions" / "base.jsonl"
    if what == "score":
        metrics["systems"]["base"]["all"]["ROUGE-L"]["value"] += 0.001
    else:
        rows = one.predictions["base"]
        rows[0]["prediction" if what == "answer" else "reference"] = rows[0]["reference"] + " penicillin"
        runs.write_jsonl(path, rows)
        metrics["sha256"]["predictions/base.jsonl"] = runs.sha256_file(path)
    files.write_sealed(one.folder / "metrics.json", metrics)
    assert verify.main([one.run.name]) == 1
    assert re.search(r"metrics\.json says [\w-]+ \S+ of base: its predictions have", capsys.readouterr().out)
