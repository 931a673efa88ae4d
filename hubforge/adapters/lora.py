"""Train a LoRA whose change stays out of a protected subspace of the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from hubforge.adapters._examples import Columns, Encoder, Examples, Format, columns_of, make_examples, no_template
from hubforge.adapters._launch import check_launch, train_on_several
from hubforge.adapters._modules import LINEARS, in_checkpoint, in_model, rates, select
from hubforge.adapters._processes import rank_here
from hubforge.errors import StepError
from hubforge.models import load_model, load_tokenizer, read_config
from hubforge.op import Context, DatasetRef, Kind, MaskRef, Metrics, ModelRef, Op
from hubforge.rows import rows
from hubforge.tensors.chat_template import template_of
from hubforge.tensors.projection import Projection, Subspace, Subspaces
from hubforge.tensors.tokens import require_same

if TYPE_CHECKING:
    import torch

    from hubforge.adapters._guard import Factors
    from hubforge.adapters._trainer import Tables
    from hubforge.adapters._writing import Trained

_PREFIX = "base_model.model."


class Lora(Op):
    """A LoRA adapter, trained by TRL's SFTTrainer; under a mask, held out of the subspace of what it must not undo.

    With `protect`, A is projected when it is drawn, gradients before each optimiser step, A and B after it: projecting
    gradients alone leaks .15 to .28 under Adam, whose steps go per element. The leak is measured, not assumed.
    """

    makes: ClassVar[Kind] = "adapter"
    version: ClassVar[int] = 2
    pins: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "trl")
    exact: ClassVar[bool] = False  # Sums of float32 depend on the device and its number of threads.
    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
    extra: ClassVar[str] = "train"
    resumable: ClassVar[bool] = True
    unkeyed: ClassVar[tuple[str, ...]] = ("save_steps",)
    formula: ClassVar[str] = "ΔW = s · B · A;  with `protect`, two-sided: UᵀB = 0 and A·V = 0"
    source: ClassVar[str] = (
        "LoRA: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; "
        "gradients held out of a subspace: Farajtabar et al. 2019, arXiv:1910.07104"
    )

    model: ModelRef = Field(description="The model to train on; its own weights stay as they are.")
    data: DatasetRef = Field(description="What to learn: rows of text, pairs of instruction and answer, or chats.")
    tokenizer: ModelRef | None = Field(
        None,
        description="A model whose tokenizer and chat template to use instead, such as the instruct model: pretrained "
        "ones often have no template. Same vocabulary.",
    )
    protect: MaskRef | None = Field(None, description="A subspace mask of the model: what the change must not touch.")
    projection: Literal["two_sided", "published", "core", "left", "right", "scale", "none"] = Field(
        "two_sided",
        description="How: two_sided, clear of U and V; left, of U; right, of V; core, of their product U·Vᵀ (half of "
        "the rank clear of each); scale, both damped by `strength`; published, gradients only, as first published, "
        "which leaks; none, only measured.",
    )
    strength: float = Field(
        1.0, gt=0, le=1, description="For `scale`: the share of each update inside the subspace that is taken out."
    )
    importance: MaskRef | None = Field(
        None,
        description="A mask made by `layers`, or a Fisher mask of the model, whose sums are then brought to [0, 1] by "
        "minmax: layer l learns at learning_rate · (1 − F_l). (A scale on gradients would do nothing: Adam divides it "
        "out.)",
    )
    importance_floor: float = Field(
        0.0, ge=0, le=1, description="The least share of the learning rate that a layer keeps under `importance`."
    )

    rank: int = Field(16, ge=1, le=4096, description="r, columns of B and rows of A.")
    alpha: float = Field(32, gt=0, description="The change is scaled by alpha / rank (rsLoRA: alpha / √rank).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of a layer's inputs that A does not see while training.")
    target_modules: str | list[str] = Field(
        LINEARS,
        description="As PEFT's: a pattern for whole module names, or a list of their endings. By default the seven "
        "linears of each decoder layer, and none in vision or audio towers.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / √rank.")
    use_dora: bool = Field(False, description="Not supported; says why.")
    modules_to_save: list[str] | None = Field(None, description="Not supported; says why.")

    format: Format | None = Field(
        None, description="text, instruction or chat; by default what the columns of the first row look like."
    )
    dataset_text_field: str = Field("", description="Column of the text; by default `text`.")
    messages_column: str = Field("", description="Column of the messages; by default `messages` or `conversations`.")
    prompt_column: str = Field(
        "", description="Column of the prompt; by default `prompt`, or `instruction` and `input`."
    )
    completion_column: str = Field(
        "", description="Column of the answer; by default `completion`, `response`, `output` or `answer`."
    )
    chat_template: bool | None = Field(
        None,
        description="For pairs: whether they go through the tokenizer's chat template; by default where it has one.",
    )
    max_length: int = Field(1024, ge=2, description="Tokens per sample; what is longer is cut, counted and reported.")
    packing: bool = Field(False, description="Several samples per row of `max_length` tokens, blind to one another.")

    learning_rate: float = Field(2e-4, gt=0, description="Of AdamW, at its peak.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of all steps in which the learning rate rises.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the data; `max_steps` overrides it.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps, whatever the size of the data.")
    per_device_train_batch_size: int = Field(4, ge=1, description="Samples per forward and backward pass.")
    gradient_accumulation_steps: int = Field(4, ge=1, description="Passes per optimiser step.")
    num_processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that train together, each on a GPU of its own with its own copy of the model. A step "
        "takes per_device_train_batch_size · num_processes · gradient_accumulation_steps samples, so it decides the "
        "result: with twice the processes, halve the accumulation.",
    )
    gradient_checkpointing: bool = Field(True, description="Recompute activations: less memory, a third more time.")
    optim: Literal["adamw_torch", "sgd", "adafactor"] = Field("adamw_torch", description="The optimiser.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay of A and B.")
    max_grad_norm: float = Field(1.0, gt=0, description="Norm to which the gradient of all factors is clipped.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the model's frozen weights: auto takes the checkpoint's. A and B are float32."
    )
    bf16: bool | None = Field(
        None, description="Multiply in bfloat16 while training (autocast); by default on CUDA with a bfloat16 model."
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of the adapter's file. The final leak is measured after rounding to it."
    )
    seed: int = Field(0, ge=0, description="Draws A, the order of the samples, dropout, and what is held out.")
    save_steps: int = Field(200, ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    eval_share: float = Field(0.0, ge=0, le=0.5, description="Share of the rows held out to measure the loss on.")
    eval_steps: int = Field(100, ge=1, description="Steps between such measurements; the best of them is kept.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop once that many measurements in a row were no better. Needs `eval_share`."
    )

    @field_validator("use_dora")
    @classmethod
    def _no_dora(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "DoRA rescales each column of W + B·A, so its change is no B·A, and no projection of the factors holds "
                "it out of a subspace; use_rslora helps high ranks instead"
            )
        return value

    @field_validator("modules_to_save")
    @classmethod
    def _no_whole_modules(cls, value: list[str] | None) -> list[str] | None:
        if value:
            raise ValueError(
                f"modules_to_save would train {', '.join(value)} whole, outside every protection; "
                "name linear layers in target_modules instead"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Lora:
        if self.projection == "core" and self.rank < 2:
            raise ValueError("projection: core splits the rank in two, so rank must be at least 2")
        if self.strength != 1 and self.projection != "scale":
            raise ValueError(f"strength is for `projection: scale`, not {self.projection}")
        if self.protect is None and "projection" in self.model_fields_set:
            raise ValueError(f"projection: {self.projection} without `protect`: name the subspace mask to stay out of")
        if self.importance is None and "importance_floor" in self.model_fields_set:
            raise ValueError("importance_floor without `importance`: name the mask whose layers it is about")
        if self.early_stopping_patience is not None and not self.eval_share:
            raise ValueError("early_stopping_patience needs rows to measure on: set eval_share, such as 0.05")
        return self

    def misfit(self, field: str, form: str) -> str:
        if field == "protect":
            return "" if form == "subspace" else "Make one with `op: subspace`."
        return "" if form in ("layers", "fisher") else "Name a mask made by `layers`, or a Fisher mask."

    def preflight(self, ctx: Context) -> None:
        """What headers and the first row show, where model, mask and data are there already."""
        check_launch(self, ctx)
        self._check_tokenizer(ctx)
        shapes: Mapping[str, tuple[int, ...]] = {}
        if self.model in ctx.inputs:
            every = in_checkpoint(ctx.path(self.model), read_config(ctx.path(self.model)))
            shapes = {name: every[name] for name in select(every, self.target_modules, self.rank, ctx.where)}
        if self.protect is not None and self.protect in ctx.inputs:
            mask = Subspaces(ctx.path(self.protect), str(self.protect))
            mask.bind({f"{name}.weight": shape for name, shape in shapes.items()}, ctx.where)
        if self.importance is not None and self.importance in ctx.inputs:
            self._rates(ctx, shapes)
        if self.data in ctx.inputs:
            columns = columns_of(self._rows(ctx, 1)[0], self.format, self._named())
            tokenizer = self.tokenizer or self.model
            through = columns.format == "chat" or self.chat_template
            if through and tokenizer in ctx.inputs and template_of(ctx.path(tokenizer)) is None:
                raise no_template(str(ctx.path(tokenizer)))

    def run(self, ctx: Context) -> Metrics:
        from hubforge.adapters._quiet import quiet
        from hubforge.adapters._trainer import STATE, Tables, is_finished, newest_checkpoint
        from hubforge.adapters._writing import write_reports

        check_launch(self, ctx)
        self._check_tokenizer(ctx)
        newest = newest_checkpoint(ctx.out / STATE)
        with quiet():
            examples, columns = self._examples(ctx)
            tables = Tables.of(self, examples)
            if self.num_processes == 1 or (newest is not None and is_finished(newest)):
                trained = self.train(ctx, tables, newest)
            else:
                trained = train_on_several(self, ctx, tables, newest)
        metrics = write_reports(self, ctx, examples, columns.format, trained, self._base(ctx)[0])
        shutil.rmtree(ctx.out / STATE, ignore_errors=True)
        return metrics

    def train(self, ctx: Context, tables: Tables, newest: Path | None) -> Trained:
        """Load, train and write the adapter: in this process, or as one of several of which the first writes."""
        from hubforge.adapters._guard import Guard, leaks
        from hubforge.adapters._quiet import quiet
        from hubforge.adapters._trainer import train
        from hubforge.adapters._writing import Trained, rounded, write_adapter
        from hubforge.seeding import repeatable

        with quiet(), repeatable(self.seed, ctx.device):
            model, factors = self._adapted(ctx)
            subspaces = self._subspaces(ctx, factors)
            guarded = self.projection != "none"
            guard = None
            if subspaces:
                guard = Guard(factors, subspaces if guarded else {}, self._how(), self.strength, watched=subspaces)
            tokenizer = self._load_tokenizer(ctx)
            course = train(self, ctx, model, tokenizer, tables, guard, self._rates(ctx, factors), newest)
            kept = rounded(factors, self.save_dtype)
            found = leaks(kept, subspaces) if rank_here() == 0 else {}
            if rank_here() == 0:
                write_adapter(ctx, model, kept, self.save_dtype, *self._base(ctx))
        parameters = sum(part.a.numel() + part.b.numel() for part in factors.values())
        return Trained(course, found, len(factors), parameters)

    def _how(self) -> Projection:
        return "two_sided" if self.projection == "none" else self.projection

    def _named(self) -> Columns:
        return Columns(
            "text", self.dataset_text_field, self.messages_column, self.prompt_column, self.completion_column
        )

    def _rows(self, ctx: Context, limit: int | None = None) -> list[dict[str, Any]]:
        data = ctx.artifact(self.data)
        named = [name for name in self._named().needed if name]
        return rows(data.path, files=[file.path for file in data.files] or None, limit=limit, columns=named)

    def _check_tokenizer(self, ctx: Context) -> None:
        """SourceError when the tokenizer that was named means other tokens by the model's numbers."""
        if self.tokenizer is not None and self.tokenizer in ctx.inputs and self.model in ctx.inputs:
            mend = f"Name a model of {self.model}'s own vocabulary, such as the instruct model that was made from it."
            require_same(ctx.path(self.model), ctx.path(self.tokenizer), mend)

    def _load_tokenizer(self, ctx: Context) -> Any:
        tokenizer = load_tokenizer(ctx.path(self.tokenizer or self.model))
        tokenizer.padding_side = "right"
        return tokenizer

    def _examples(self, ctx: Context) -> tuple[Examples, Columns]:
        every = self._rows(ctx)
        columns = columns_of(every[0], self.format, self._named())
        tokenizer = self._load_tokenizer(ctx)
        examples = make_examples(
            every,
            Encoder(tokenizer, columns, self.chat_template),
            max_length=self.max_length,
            eval_share=self.eval_share,
            seed=self.seed,
            progress=lambda done, total: ctx.progress(done, total, "row", "tokenizing"),
        )
        if examples.truncated:
            ctx.warn(
                f"{examples.truncated} of {len(every)} samples are cut to {self.max_length} tokens "
                f"(the longest has {examples.longest})"
            )
        if examples.skipped:
            ctx.warn(f"{examples.skipped} of {len(every)} samples have nothing to learn from and are left out")
        if not examples.train or (self.eval_share and not examples.held_out):
            part = "train on" if not examples.train else "measure on"
            mend = "Raise max_length, or eval_share." if examples.train or examples.truncated else ""
            raise StepError(f"{self.data} leaves no sample to {part}", where=ctx.where, mend=mend)
        ctx.note(f"{len(examples.train)} samples as {columns.format}, {examples.tokens} tokens, "
                 f"{examples.loss_tokens} of them learnt")  # fmt: skip
        return examples, columns

    def _adapted(self, ctx: Context) -> tuple[Any, dict[str, Factors]]:
        """The model with a fresh adapter on it, and the adapter's factors by module."""
        import torch
        from peft import LoraConfig, get_peft_model

        from hubforge.adapters._guard import Factors

        base = load_model(ctx.path(self.model), device=ctx.device, dtype=self._dtype())
        base.config.use_cache = False
        names = select(in_model(base), self.target_modules, self.rank, ctx.where)
        largest = base.get_input_embeddings().weight.shape[0]
        if self.tokenizer is not None and len(load_tokenizer(ctx.path(self.tokenizer))) > largest:
            what = f"the tokenizer of {self.tokenizer} has more tokens than {self.model} has embeddings ({largest})"
            raise StepError(what, where=ctx.where, mend="Both must have one vocabulary.")
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(self.seed)
        model = get_peft_model(base, config)
        modules = dict(model.named_modules())
        factors = {}
        for name in names:
            layer = modules[f"{_PREFIX}{name}"]
            factors[name] = Factors(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if len(trained) != 2 * len(names) or any(parameter.dtype != torch.float32 for parameter in trained):
            raise StepError(f"PEFT made {len(trained)} float32 factors of {len(names)} modules, not two of each")
        return model, factors

    def _dtype(self) -> torch.dtype | None:
        import torch

        return None if self.dtype == "auto" else torch.float32 if self.dtype == "float32" else torch.bfloat16

    def _subspaces(self, ctx: Context, factors: Mapping[str, Factors]) -> dict[str, Subspace]:
        """What is protected, by module, where the factors are."""
        if self.protect is None:
            return {}
        mask = Subspaces(ctx.path(self.protect), str(self.protect))
        shapes = {f"{name}.weight": (part.b.shape[0], part.a.shape[1]) for name, part in factors.items()}
        found: dict[str, Subspace] = {}
        for tensor, own in mask.bind(shapes, ctx.where).items():
            name = tensor.removesuffix(".weight")
            found[name] = mask.read(own).to(factors[name].a.device)
            for side, basis, width in (
                ("U", found[name].U, shapes[tensor][0]),
                ("V", found[name].V, shapes[tensor][1]),
            ):
                if basis.shape[1] >= width:
                    what = f"{side} of {own} in {self.protect} spans all {width} dimensions: nothing is left to learn"
                    raise StepError(what, where=ctx.where, mend="Make the mask with a lower rank or max_share.")
        return found

    def _rates(self, ctx: Context, modules: Iterable[str]) -> dict[str, float]:
        if self.importance is None:
            return {}
        mask = ctx.artifact(self.importance)
        folder = mask.path.parent if mask.path.is_file() else mask.path
        there = [name for name in ("layers.json", "layer_importance.json") if (folder / name).is_file()]
        if not there:
            what = f"{self.importance} has no layer_importance.json, which says how much each layer matters"
            mend = "Make its layers with `op: layers`, and name those."
            raise StepError(what, where=ctx.where, mend=mend)
        return rates(mask.read_json(there[0]), modules, self.importance_floor, ctx.where)

    def _base(self, ctx: Context) -> tuple[str, str | None]:
        """What the adapter says of its base: repository and commit, or the recipe's name for it; never a path."""
        origin = ctx.artifact(self.model).origin
        return (str(origin["repo"]), origin.get("commit")) if origin.get("repo") else (str(self.model), None)
