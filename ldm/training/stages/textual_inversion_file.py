"""The result of the stage `textual-inversion`: a file for each new word, and those of the adapter beside them."""

from __future__ import annotations

from pathlib import Path

from ldm.files import replacing
from ldm.training.stages import adapter_file
from ldm.training.stages.sections import embedding_name
from ldm.training.stages.textual_inversion import TextualInversionStage
from ldm.weights.embeddings import write_embedding
from ldm.weights.tensors import LINEAGE

RESULT = "embeddings"
DIFFUSERS = "diffusers-embeddings"


def write(stage: TextualInversionStage, folder: Path, lineage: str) -> None:
    """Write the vectors of each word, then the adapter, if there is one.

    Vectors of one text encoder get the key of AUTOMATIC1111's programs, and in other files diffusers'. Those of two get
    the keys of SDXL's pair, which both read.
    """
    words, towers = stage.words.learned(), [config.component for config in stage.model.text_encoders.configs]
    told = {"step": str(stage.section.steps), "sd_checkpoint_name": stage.model.family.name, LINEAGE: lineage}
    for name in (RESULT, DIFFUSERS) if len(towers) == 1 else (RESULT,):
        with replacing(folder / name, folder=True, overwrite=True, need=0) as temporary:
            for word in words:
                own = dict(zip(towers, word.vectors, strict=True))
                file = temporary / f"{embedding_name(word.names[0])}.safetensors"
                write_embedding(own, word.names[0], file, told, as_diffusers=name == DIFFUSERS)
    if stage.section.pivotal:
        adapter_file.write(stage, folder, lineage)
