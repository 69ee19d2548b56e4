"""A model → another on the same tensors: what is attached to one of the two, or swapped in it, the other does not have.

So an adapter that was saved can be loaded beside the one that is trained, without a second copy of the base.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

NOT_ITS_OWN = frozenset({"forward", "peft_config", "hf_device_map"})
"""What was put on single modules of a model: a forward of its own, the adapters that were attached, its hooks' plan."""


def twin(model: Any, with_adapter: bool = True) -> Any:
    """The same parameters and buffers in modules of their own, whose forwards are those of their classes.

    Args:
        model: of transformers, or a PeftModel.
        with_adapter: False gives the base alone, as it was before anything was attached.

    Raises:
        ValueError: its modules are moved between devices while they run.
    """
    return _twin_of(model if with_adapter else model.get_base_model(), with_adapter, {})


def _twin_of(module: "nn.Module", with_adapter: bool, made: "dict[int, nn.Module]") -> "nn.Module":
    if not with_adapter:
        module = _under_adapters(module)
    if id(module) in made:
        return made[id(module)]
    if "_hf_hook" in vars(module):
        raise ValueError(f"{type(module).__name__} is moved between devices")
    found = made[id(module)] = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if name in NOT_ITS_OWN and not (name == "peft_config" and with_adapter):
            continue
        vars(found)[name] = _apart(value, with_adapter, made)
    return found


def _apart(value: Any, with_adapter: bool, made: "dict[int, nn.Module]") -> Any:
    """An attribute: containers and the modules in them are new, everything else is shared."""
    from torch import nn

    def part(one: Any) -> Any:
        return _twin_of(one, with_adapter, made) if isinstance(one, nn.Module) else one

    if isinstance(value, dict):
        copied = value.copy()
        copied.update((key, part(one)) for key, one in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(part(one) for one in value)
    return set(value) if type(value) is set else part(value)


def _under_adapters(module: "nn.Module") -> "nn.Module":
    """What stood in the place of a module before PEFT wrapped it, once or several times."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module
