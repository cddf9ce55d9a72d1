"""What a checkpoint between two logs needs, so that the next log says what it would have said without a stop."""

import json
from pathlib import Path

from transformers.trainer_pt_utils import nested_gather

from src.engine import faults

UNLOGGED = "unlogged.json"  # of a checkpoint: the loss since the last log, the step of that, the seconds so far


def read(checkpoint: str | None) -> dict | None:
    """What `BetweenLogs` wrote into a checkpoint; None where there is nothing."""
    path = checkpoint and Path(checkpoint, UNLOGGED)
    return json.loads(path.read_text("utf-8")) if path and path.is_file() else None


class BetweenLogs:
    """Of a Trainer with `progress`: checkpoints keep what is summed up since the last log, `unlogged` is taken up."""

    unlogged = None

    def _save_checkpoint(self, model, trial):
        self.progress.on_epoch_end(self.args, self.state, self.control)  # its seconds so far
        loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        weights = sum(p.detach().sum().item() for p in self.model.parameters() if p.requires_grad)
        faults.refuse_divergence(self, {"loss": loss, "sum of the adapter's weights": weights})  # before it is kept
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            sums = {"loss": loss, "logged": self._globalstep_last_logged, "seconds": self.progress.seconds}
            path = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", UNLOGGED)
            path.write_text(json.dumps(sums), "utf-8")

    def _run_epoch(self, *args, **kwargs):
        if self.unlogged:
            self._tr_loss += self.unlogged["loss"]
            self._globalstep_last_logged, self.progress.seconds = self.unlogged["logged"], self.unlogged["seconds"]
            self.unlogged = None
        super()._run_epoch(*args, **kwargs)
