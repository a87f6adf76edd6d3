"""What PyTorch can say or do about a tensor that has no public name."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def forbid_memory(tensor: torch.Tensor) -> None:
    """Lets code that reads the memory of a tensor without any raise an error, not crash."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.detach()`` that counts versions with the tensor also within `__torch_dispatch__`,
    where PyTorch gives it a count of its own."""
    if tensor.is_inference():
        return tensor.detach()
    key = torch._C.DispatchKey.ADInplaceOrView
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        torch._C._dispatch_tls_set_dispatch_key_included(key, True)
        return tensor.detach()


def gathered_parameters() -> Iterator[tuple[torch.Tensor, bool]]:
    """Those that FSDP2 has gathered from their shards, each with whether it is freed after the
    forward of its module (which may have several groups of them from 2.13)."""
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in getattr(group, "fsdp_params", ()):
                gathered = getattr(parameter, "_unsharded_param", None)
                if gathered is not None:
                    yield gathered, group.post_forward_mesh_info is not None
