"""How a model comes to another machine: by a path that every machine sees, or as weights in the object store."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mechsafety.errors import MechsafetyError, first_line

# part of the names that TransformerLens' wrapper puts into those of Hugging Face
WRAPPER = "._original_component"


@dataclass(frozen=True, slots=True)
class Weights:
    """A Hugging Face model without its code: what makes the same model again.

    Attributes:
        kind: Its class.
        config: Its configuration.
        tensors: Dtype, bytes and shape of each weight and buffer.
        tokenizer: Its tokenizer, with chat template.
        template_options: Options of the chat template.
        name: Name in results.
        device: Where it runs.
    """

    kind: type
    config: Any
    tensors: Mapping[str, tuple[str, Any, tuple[int, ...]]]
    tokenizer: Any
    template_options: Mapping[str, Any]
    name: str
    device: str


def pack_weights(model: Any) -> Weights:
    """The weights of a model in memory.

    Raises:
        MechsafetyError: It is a HookedTransformer, whose weights no longer are those of a Hugging Face model.
    """
    import torch

    hf = model.hf_model
    if not hasattr(hf, "config") or not hasattr(hf, "get_output_embeddings"):
        raise MechsafetyError(
            f"{model.name} is a {type(hf).__name__} in memory, which cannot be sent to other machines",
            expected="a model that was loaded by name or folder",
        )
    model.backend.check_in_memory("sending a model in memory to other machines")
    with torch.device("meta"):
        bare = type(hf)(hf.config)
    # buffers that no checkpoint holds (rotary frequencies) may have been rounded with the weights
    names = dict.fromkeys([*bare.state_dict(), *(name for name, _ in bare.named_buffers())])
    every = {**hf.state_dict(), **dict(hf.named_buffers())}
    own = {name.replace(WRAPPER, ""): tensor for name, tensor in every.items()}
    tensors = {}
    for name in names:
        tensor = own[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = (dtype, torch.atleast_1d(tensor).view(torch.uint8).numpy().reshape(-1), tuple(tensor.shape))
    options = dict(model.template_options)
    return Weights(type(hf), hf.config, tensors, model.tokenizer, options, model.name, str(model.device))


def load(recipe: Any) -> Any:
    """The `LensModel` of a recipe: arguments of `load_model`, or `Weights`."""
    import torch

    from mechsafety.models import load_model

    if not isinstance(recipe, Weights):
        return load_model(**recipe)
    hf = recipe.kind(recipe.config).eval()
    state = {
        name: torch.frombuffer(bytearray(array.tobytes()), dtype=getattr(torch, dtype)).reshape(shape)
        for name, (dtype, array, shape) in recipe.tensors.items()
    }
    for name, _ in list(hf.named_buffers()):
        owner, _, own = name.rpartition(".")
        setattr(hf.get_submodule(owner), own, state[name])
    hf.load_state_dict({name: state[name] for name in hf.state_dict()}, assign=True)
    hf.tie_weights()
    model = load_model((hf, recipe.tokenizer), device=recipe.device, template_options=recipe.template_options)
    model.name = recipe.name
    return model


def pack_call(function: Any, args: Any, kwargs: Any) -> tuple[bytes, dict[str, Any]]:
    """A call as bytes, in which models are references; and the models, by the key of the reference.

    Raises:
        MechsafetyError: Something that it was given cannot travel.
    """
    import io

    from ray import cloudpickle

    models: dict[str, Any] = {}

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # cloudpickle has no types
        def persistent_id(self, value: Any) -> Any:
            if not hasattr(value, "hash_weights"):
                return None
            plain = value.reading(())
            key = next((known for known, model in models.items() if model is plain), f"model {len(models)}")
            models[key] = plain
            return key, value.opener_ids, value.shortcuts, value.max_batch_tokens

    file = io.BytesIO()
    try:
        Pickler(file).dump((function.__module__, function.__qualname__, args, kwargs))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise MechsafetyError(
            f"an argument cannot be sent to other machines ({first_line(error)})",
            expected="prompts, models, options, and functions of them",
            hint="pass pairs rather than their stored runs",
        ) from None
    return file.getvalue(), models
