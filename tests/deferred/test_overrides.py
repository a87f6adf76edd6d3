"""Functions that copy deferred logits elsewhere or read their memory."""

import copy
import io
import pickle

import pytest
import torch
from deferred_logits import (
    Head,
)

HOMES = {
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "array": lambda z: torch.from_numpy(__import__("numpy").asarray(z.detach())),
    "cpu": lambda z: z.cpu(),
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "list": lambda z: torch.tensor(z.tolist()),
    "storage": lambda z: torch.tensor(list(z.contiguous().storage())).view(z.shape),
    "data": lambda z: z.data,
    "share_memory_": lambda z: z.detach().share_memory_().cpu(),
    "collate": lambda z: torch.utils.data.default_collate([z.detach()])[0],
}


@pytest.mark.parametrize("move", HOMES.values(), ids=HOMES)
@pytest.mark.parametrize("change", [lambda z: z, lambda z: z[:, 1:]], ids=["all", "rows"])
def test_other_homes(move, change):
    head = Head()
    moved = move(change(head.deferred()))
    assert type(moved) is torch.Tensor
    torch.testing.assert_close(moved.detach(), change(head.plain()).detach())


def test_function_that_bypasses_subclasses():
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(Head().deferred().detach())


def test_saved():
    head = Head()
    file = io.BytesIO()
    torch.save({"logits": head.deferred()}, file)
    file.seek(0)
    loaded = torch.load(file)["logits"]
    assert type(loaded) is torch.Tensor
    torch.testing.assert_close(loaded.detach(), head.plain().detach())


def test_deepcopy_of_a_result_is_the_same_error():
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(Head().deferred())
    with pytest.raises(RuntimeError, match="requires grad"):
        Head().deferred().numpy()


def test_pinning_is_the_same_error():
    def error(tensor):
        try:
            return type(tensor.pin_memory())
        except Exception as why:
            return type(why)

    head = Head(requires_grad=False)
    assert error(head.deferred()) == error(head.plain())
