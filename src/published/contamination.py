"""Has a base model read a test set? A probe that needs its weights and the texts."""

import numpy as np
import torch


@torch.inference_mode()
def continuation(model, tokenizer, texts: list[str]) -> np.ndarray:
    """Mean log-likelihood (nats a token) of the second half of each text's tokens, given the first.

    Raises ValueError for a text of fewer than 4 tokens.
    """
    model.eval()
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < 4:
            raise ValueError(f"{text!r} has {len(ids)} tokens: expected at least 4. Leave such texts out.")
        half = len(ids) - len(ids) // 2
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        inputs = torch.tensor([start + ids], device=model.device)
        logits = model(input_ids=inputs, logits_to_keep=len(ids) - half + 1, use_cache=False).logits[0, :-1]
        likely = logits.float().log_softmax(-1).gather(1, inputs[0, len(start) + half :, None])
        found.append(likely.mean().item())
    return np.array(found)


def memorised(model, tokenizer, suspected: list[str], control: list[str], paired: bool = False) -> dict[str, float]:
    """Does the model continue the suspected texts better than the control ones, and better than by chance?

    control: texts of the same kind that it cannot have read. paired: the i-th is a paraphrase of the i-th suspected
    text, which takes out how hard each is. Returns the means of `continuation`, their difference and the one-sided p
    of a permutation test (9,999 draws, or all). A large p is no proof that the texts were not read.
    """
    from scipy.stats import permutation_test

    first, second = continuation(model, tokenizer, suspected), continuation(model, tokenizer, control)
    test = permutation_test(
        (first, second), lambda x, y, axis: np.mean(x, axis) - np.mean(y, axis), vectorized=True,
        permutation_type="samples" if paired else "independent", alternative="greater", rng=np.random.default_rng(0),
    )  # fmt: skip
    return {
        "suspected": float(first.mean()), "control": float(second.mean()),
        "difference": float(test.statistic), "p": float(test.pvalue),
    }  # fmt: skip
