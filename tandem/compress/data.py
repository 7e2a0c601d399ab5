"""Text to score and to distil on: the sources of a recipe of pre-training, and conversations of post-training beside them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tandem.compress.calibration import Calibration
from tandem.compress.recipe import CompressRecipe, DistilPart, PostPart
from tandem.model.tokenizer import Tokenizer, load_tokenizer
from tandem.spec.errors import SpecError
from tandem.train.data.prepare import prepare
from tandem.train.data.prepared import fingerprint
from tandem.train.data.shards import write_encoded
from tandem.train.data.stream import TokenStream, source_folder
from tandem.train.recipe import BatchPart, DataPart, PhasePart, Recipe, SourcePart, TokenizerPart
from tandem.train.recipe_files import load_recipe

POST = "conversations"
"""The source of post-training data."""
_HELD_OUT = 20
"""Every so many-th conversation is not learned from."""
Progress = Callable[[str, str, int], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tokens on disk, and how they are blended."""

    folder: Path
    data: DataPart
    """All sources; its one phase is the pre-training blend."""
    post: bool
    """Whether there are conversations."""
    fingerprint: str

    def blend(self, post_share: float) -> DataPart:
        """The sources with a share of conversations, where there are any."""
        if not self.post:
            return self.data
        weights = self.data.phases[-1].weights
        total = sum(weights.values())
        blended = {name: (1 - post_share) * weight / total for name, weight in weights.items()}
        return replace(self.data, phases=(PhasePart(until=1.0, weights={**blended, POST: post_share}),))

    def calibration(self, samples: int, length: int, post_share: float, seed: int) -> Calibration:
        """Samples of the blend."""
        batch = BatchPart(sequence_length=length, sequences=samples, tokens=length * samples)
        found = TokenStream(self.folder, self.blend(post_share), batch, seed=seed).batch()
        return Calibration(
            input_ids=torch.from_numpy(found.input_ids),
            labels=torch.from_numpy(found.labels),
            documents=torch.from_numpy(found.documents),
        )


def prepare_data(recipe: CompressRecipe, teacher: Path, folder: Path, *, progress: Progress | None = None) -> Prepared:
    """Make `folder` hold the recipe's data, or find that it does. Raises SpecError for what cannot be prepared."""
    if recipe.data is None:
        raise SpecError("data=None: state which texts the model is scored and distilled on")
    base, base_folder = load_recipe(recipe.data.pretraining, recipe.data.changes)
    tokenizer = TokenizerPart(name=str(teacher))
    base = replace(base, data=replace(base.data, tokenizer=tokenizer, phases=(replace(base.data.phases[-1], until=1.0),)))
    prepare(base, folder, recipe_folder=base_folder, progress=progress)
    mark, data, post = fingerprint(base, base_folder), base.data, recipe.data.post
    if post is not None:
        if POST in data.sources:
            raise SpecError(f"data.pretraining={recipe.data.pretraining!r}: has a source {POST!r}; rename it")
        _write_conversations(post, load_tokenizer(teacher), recipe.seed, folder)
        data = replace(data, sources={**data.sources, POST: SourcePart(kind="jsonl", path=POST)})
        mark = f"{mark} {asdict(post)} {recipe.seed}"
    return Prepared(folder=folder, data=data, post=post is not None, fingerprint=mark)


def distil_recipe(recipe: CompressRecipe, part: DistilPart, prepared: Prepared, base: Recipe, *, name: str) -> Recipe:
    """A distillation in the words of the training loop; `base` gives what is not stated here."""
    batch = BatchPart(sequence_length=part.length, sequences=part.rows, micro=part.micro, tokens=part.tokens)
    warmup = min(1.0, part.warmup_steps / batch.steps)
    return replace(
        base,
        name=name,
        about=recipe.about,
        seed=recipe.seed,
        data=prepared.blend(part.post_share),
        batch=batch,
        optimiser=replace(base.optimiser, lr=part.lr, min_lr=part.final_lr, warmup=warmup, decay=1 - warmup, schedule="wsd"),
        precision=replace(base.precision, linears=part.linears),
        evaluate=replace(base.evaluate, every=max(1, batch.steps // 10), batches=2, samples=(), tasks=(), needles=()),
    )


def _write_conversations(post: PostPart, tokenizer: Tokenizer, seed: int, folder: Path) -> None:
    """Encode them into the folder, once; they appear whole."""
    target = source_folder(folder, POST)
    if target.exists():
        return
    from tandem.align.encode import encode_sample
    from tandem.align.material import samples_of, seed_of
    from tandem.align.recipe import MixPart

    asked: dict[str, Any] = {name: value for name, value in asdict(post).items() if name != "tasks"}
    samples = samples_of(post.tasks, MixPart(**asked), seed_of(seed, "compression"))
    encoded = [encode_sample(sample, tokenizer) for sample in samples]
    documents = [(one.ids, one.learned.index(True)) for one in encoded]
    held_out = np.arange(len(documents)) % _HELD_OUT == 0
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{POST}."))
    try:
        write_encoded(draft / POST, documents, tokenizer.backend.get_vocab_size(), held_out)
        (draft / POST).rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
