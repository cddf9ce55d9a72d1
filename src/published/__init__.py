"""The two published experiments, replayed for notebook 05. The corrected path never meets them.

Recipe 1 is Mistral-7B-v0.1 on MTS-Dialog (imsachinsingh00/DocBot_Mistral), recipe 2 Mistral-7B-Instruct-v0.2 on SAMSum
(msznajder/mistral-7b-samsum-dialogue-summary-finetune). protocol.py needs the data alone; defects.py trains the
demo's base, or another recipe's, with one defect at a time; costs.py compares what it measured.
"""

from src.published.costs import costs
from src.published.defects import (
    DEFECTS,
    PROSE,
    Defect,
    answer,
    answers,
    encoded,
    fine_tuned,
    generate_right_padded,
    measure,
    score,
    teacher_forced,
    train,
)
from src.published.protocol import (
    RECIPE2_TURN,
    official_tokenizer,
    recipe1_prompt,
    recipe1_protocol,
    recipe1_split,
    recipe2_prompt,
)

__all__ = [
    "DEFECTS", "PROSE", "RECIPE2_TURN", "Defect", "answer", "answers", "costs", "encoded", "fine_tuned", "generate_right_padded",
    "measure", "official_tokenizer", "recipe1_prompt", "recipe1_protocol", "recipe1_split", "recipe2_prompt", "score",
    "teacher_forced", "train",
]  # fmt: skip
