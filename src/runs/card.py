"""What the hub reads of a model card."""


def card_data(name: str, recipe, library: str, tags: list[str], split: str, scores: dict):
    """The hub's metadata of a model card (ModelCardData). scores: {column: value} on the split, unstemmed."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset, unit = recipe.data.dataset, {"sacreBLEU": "0-100"}
    results = [
        EvalResult(
            task_type="summarization",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type="bleu" if column in unit else "rouge",
            metric_name=f"{column} ({unit.get(column, 'F1, 0-1, no stemmer')})",
            metric_value=round(value, 4),
        )
        for column, value in scores.items()
    ]
    about = {"base_model": recipe.base_model, "library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    return ModelCardData(model_name=name, eval_results=results, **about)
