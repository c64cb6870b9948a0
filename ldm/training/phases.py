"""The phases of a stage, one for each resolution, and the micro-batches of its batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ldm.errors import LdmError
from ldm.training.sections import SizeSection, StageSection


@dataclass(frozen=True)
class Phase:
    """The part of a stage at one resolution."""

    first: int  # its first step
    end: int  # the step after its last
    size: int
    batch: int
    micro_batch: int | None
    halves: int = 1  # 2: this is one half of the batches, and the other is class images

    @property
    def halved(self) -> Phase:
        """The same with half of the batch."""
        return replace(self, batch=self.batch // 2, halves=2)

    def parts(self, processes: int) -> int:
        """Micro-batches of each step.

        Raises:
            LdmError: the batch does not divide evenly.
        """
        share, rest = divmod(self.batch, processes)
        if rest:
            whole, half = self.batch * self.halves, ", half of it class images," if self.halves == 2 else ""
            raise LdmError(
                f"a batch of {whole}{half} does not divide among {processes} processes; choose a multiple of "
                f"{self.halves * processes}"
            )
        micro = min(self.micro_batch or share, share)
        return next(share // size for size in range(micro, 0, -1) if share % size == 0)


def phases(section: StageSection) -> list[Phase]:
    """The resolutions of a stage, one after the other.

    Raises:
        LdmError: their steps do not add up to those of the stage.
    """
    found: list[Phase] = []
    for number, part in enumerate(section.sizes):
        first = found[-1].end if found else 0
        last = number == len(section.sizes) - 1
        end = section.steps if part.steps is None or last else first + part.steps
        if not first < end <= section.steps or (part.steps is None and not last):
            raise LdmError(
                f"sizes: the steps of each but the last must be given, and add up to less than {section.steps}"
            )
        found.append(_phase(section, part, first, end))
    return found


def _phase(section: StageSection, part: SizeSection, first: int, end: int) -> Phase:
    return Phase(first, end, part.size, part.batch or section.batch, part.micro_batch or section.micro_batch)
