"""How the processes of one run meet."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others.

    Attributes:
      distributed: Run as one of several processes. JAX finds the others by itself under SLURM,
        Open MPI and Kubernetes; elsewhere it needs the three values below.
      coordinator: Host and port of process 0, such as 10.0.0.1:1234.
      processes: Number of processes in the run.
      process: Number of this process, from 0.

    Raises:
      ValueError: on construction, if the values do not fit each other.
    """

    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self):
        given = [x is not None for x in (self.coordinator, self.processes, self.process)]
        if any(given) and not (all(given) and self.distributed):
            raise ValueError(
                "coordinator, processes and process belong together, and to a distributed run: "
                "give all three and --distributed, or --distributed alone under SLURM, Open MPI "
                "or Kubernetes"
            )
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise ValueError(
                f"process={self.process} must lie between 0 and {self.processes - 1}, one less "
                f"than processes={self.processes}"
            )

    def start(self) -> None:
        """Meets the other processes; it must be called before JAX is used.

        Raises:
          ValueError: if the processes do not find each other.
        """
        if not self.distributed:
            return
        # Imported here: the command line's help needs the settings alone.
        import jax

        try:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the processes of the run did not meet ({error}): run under SLURM, Open MPI or "
                "Kubernetes, or check coordinator, processes and process"
            ) from error
