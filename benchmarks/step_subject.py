"""What benchmarks/step.py measures: a model with its optimizer and batch, one step of it, and the step's parts.

Shapes: N images of 3 x H x W pixels, 8 objects each.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ddetr.core.config import ModelConfig, load
from ddetr.core.model.attention import MultiScaleDeformableAttention
from ddetr.core.model.criterion import criterion
from ddetr.core.model.detector import build
from ddetr.core.model.transformer import TransformerLayer
from ddetr.core.training.optimizer import adamw
from ddetr.data.batch import Batch, Sample, collate, normalised
from ddetr.ops import reference
from torch import Tensor, nn
from torch.profiler import record_function

OURS, PLAIN, TRANSFORMERS = "ddetr", "plain torch", "transformers"
CHECKPOINTED, COMPILED = "ddetr, checkpoint_activations", "ddetr, compile"
PARTS = ("backbone", "encoder", "decoder and heads", "criterion", "backward", "optimizer")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_OBJECTS = 8


class Spans:
    """How long each named part of a step took: by the clock, on a GPU between events in its stream.

    On a GPU that is with the time for which it waits for the host. In a profile the parts have the same names.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with record_function(name):
            begin = self._mark()
            yield
            self._marks.append((name, begin, self._mark()))

    def around(self, name: str, module: nn.Module) -> None:
        entered: list[contextlib.AbstractContextManager[None]] = []

        def enter(*_: object) -> None:
            entered.append(self(name))
            entered[-1].__enter__()

        def leave(*_: object) -> None:
            entered.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def take(self) -> dict[str, float]:
        """Seconds by name since this was last asked."""
        seconds: dict[str, float] = defaultdict(float)
        if self._on_gpu:
            torch.cuda.synchronize()
        for name, begin, end in self._marks:
            seconds[name] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        self._marks.clear()
        return dict(seconds)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Case:
    variant: str
    training: bool
    precision: str
    preset: str = "r50"

    def __str__(self) -> str:
        return f"{self.preset}, {'training step' if self.training else 'inference'}, {self.precision}, {self.variant}"


class Subject:
    """One model with its optimizer and batch; `step` trains or, if the case says so, only detects."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        config = load(case.preset, ["model.pretrained_backbone=false"])
        self.case, self.device, self.dtype = case, device, DTYPES[case.precision]
        self.optim, self.classes = config.optim, config.model.num_classes
        self.spans = Spans(device)
        made = transformers_detector(config.model) if case.variant == TRANSFORMERS else self._ours(config.model)
        self.model = made.to(device).train(case.training)
        if case.training:
            self.optimizer = adamw(self.model, self.optim)
            self.weights = self.masters = self._optimized()
        if case.precision == "bf16" and case.variant != TRANSFORMERS:
            self._halve()

    def take(self, num_images: int, size: tuple[int, int]) -> None:
        """The batch of the steps to come: images of `size`, (height, width)."""
        samples = []
        for number in range(num_images):
            boxes = torch.cat([torch.rand(NUM_OBJECTS, 2) * 0.6 + 0.2, torch.rand(NUM_OBJECTS, 2) * 0.3 + 0.05], dim=1)
            labels = torch.randint(self.classes, (NUM_OBJECTS,))
            samples.append(Sample(torch.randint(256, (3, *size), dtype=torch.uint8), boxes, labels, number, size))
        packed = collate(samples)
        self.batch = (packed.pin_memory() if self.device.type == "cuda" else packed).batch()

    def step(self) -> None:
        """Raises FloatingPointError when the loss is not finite: the time would mean nothing."""
        if not self.case.training:
            with self.spans("step"), torch.inference_mode():
                self._forward(self.batch.to(self.device))
            return
        with self.spans("step"):
            self.model.zero_grad()
            self.optimizer.zero_grad()
            loss = self._loss(self.batch.to(self.device))
            with self.spans("backward"):
                loss.backward()
            with self.spans("optimizer"):
                self._update()
            if not loss.isfinite():
                raise FloatingPointError(f"{self.case}: the loss is {loss.item()}")

    def _ours(self, config: ModelConfig) -> nn.Module:
        model = build(config)
        layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
        if self.case.variant == PLAIN:
            for module in model.modules():
                if isinstance(module, MultiScaleDeformableAttention):
                    module.attend = reference.fused_deform_attn
        elif self.case.variant == CHECKPOINTED:
            for layer in layers:
                layer.keeps_activations = False
        elif self.case.variant == COMPILED:
            for module in (model.backbone.body, *layers):
                module.compile(dynamic=True)
        else:
            self.spans.around("backbone", model.backbone)
            self.spans.around("encoder", model.get_submodule("transformer.encoder"))
            for name in ("transformer.decoder.layers", "class_embed", "bbox_embed"):
                for module in model.get_submodule(name).children():
                    self.spans.around("decoder and heads", module)
        return model

    def _optimized(self) -> list[Tensor]:
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def _halve(self) -> None:
        if self.case.training:
            for group in self.optimizer.param_groups:
                group["params"] = [weight.detach().clone() for weight in group["params"]]
            self.masters = self._optimized()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.dtype)

    def _forward(self, batch: Batch, **labels: object) -> Any:
        if self.case.variant == TRANSFORMERS:
            images = normalised(batch.images, batch.padding_mask)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                return self.model(images, pixel_mask=(~batch.padding_mask).long(), **labels)
        return self.model(normalised(batch.images, batch.padding_mask, self.dtype), batch.padding_mask)

    def _loss(self, batch: Batch) -> Tensor:
        if self.case.variant == TRANSFORMERS:
            objects = zip(batch.labels.split(NUM_OBJECTS), batch.boxes_cxcywh.split(NUM_OBJECTS), strict=True)
            return self._forward(batch, labels=[{"class_labels": ids, "boxes": boxes} for ids, boxes in objects]).loss
        predictions = self._forward(batch)
        with self.spans("criterion"):
            losses = criterion(predictions, batch, self.optim, float(len(batch.labels)))
            return losses.weighted(self.optim).sum()

    @torch.no_grad()
    def _update(self) -> None:
        if self.masters is not self.weights:
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight.grad is not None:  # transformers trains no proposals
                    master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, self.optim.clip_norm)
        self.optimizer.step()
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)


def transformers_detector(config: ModelConfig) -> nn.Module:
    import transformers

    values: dict[str, Any] = {
        "use_pretrained_backbone": False,
        "auxiliary_loss": True,
        "num_labels": config.num_classes,
        "num_queries": config.queries,
        "with_box_refine": config.box_refine,
        "two_stage": config.two_stage,
        "two_stage_num_proposals": config.queries,
    }
    model = transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(**values))
    own_loss = model.loss_function

    def loss(logits: Tensor, labels: Any, device: Any, boxes: Tensor, config: Any, *layers: Tensor) -> Any:
        return own_loss(logits.float(), labels, device, boxes.float(), config, *(layer.float() for layer in layers))

    model.loss_function = loss
    for name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(any(stage in name for stage in ("layer2", "layer3", "layer4")))
    return model
