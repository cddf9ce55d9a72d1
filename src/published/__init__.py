"""The two published experiments, replayed for notebook 05. The corrected path never meets them.

Recipe 1 is Mistral-7B-v0.1 on MTS-Dialog (imsachinsingh00/DocBot_Mistral), recipe 2 Mistral-7B-Instruct-v0.2 on SAMSum
(msznajder/mistral-7b-samsum-dialogue-summary-finetune). protocol.py needs the data alone; defects.py trains the
demo's base, or another recipe's, with one defect at a time, answering.py asks it; costs.py compares the scores;
contamination.py asks a base model whether it has read a text.
"""

from src.published.answering import answer
from src.published.contamination import memorised
from src.published.costs import costs
from src.published.defects import DEFECTS, PROSE, answers, encoded, fine_tuned, measure, score, train
from src.published.protocol import (
    RECIPE2_TURN,
    official_tokenizer,
    recipe1_prompt,
    recipe1_protocol,
    recipe1_split,
    recipe2_prompt,
)
