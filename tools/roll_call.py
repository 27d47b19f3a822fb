"""Which rank has died? Asked by the others, once a collective has failed."""

import time

import torch.distributed as dist

WAIT_SECONDS = 3.0  # torchrun leaves a rank 30 s when another has died
GLOO = "gloo", "pair closure"  # words of its errors, which are no class of their own


def dead_ranks(run, error) -> tuple[str, bool] | None:
    """(a line that names the ranks that do not answer, whether this rank is to print it); None if
    the error is not a collective's."""
    if not isinstance(error, dist.DistError) and not (
            isinstance(error, RuntimeError) and any(word in str(error) for word in GLOO)):
        return None
    alive = {run.rank}
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"failed/{run.rank}", "1")
        time.sleep(WAIT_SECONDS)
        alive |= {r for r in range(run.world) if store.check([f"failed/{r}"])}
    except RuntimeError:  # the store is gone with the first rank's launcher
        alive |= set(range(1, run.world))
    gone = ", ".join(str(r) for r in range(run.world) if r not in alive) or "unknown"
    line = f"rank {gone} of {run.world} died or does not answer (during {run.stage})"
    return line, run.rank == min(alive)
