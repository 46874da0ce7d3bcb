"""Training over several ranks: DDP, or FSDP2 with its sharded tensors (DTensors).

What those need is imported where it is used: the import alone takes a second."""

import torch
import torch.distributed as dist


def wrap(model, args, runtime):
    """The model as the loop calls it: recomputing, sharded or replicated, as the flags say."""
    model.recompute = args.recompute
    if runtime.world == 1:
        return model
    if not args.shard:  # buffers need no broadcast: none of ours changes
        return torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=runtime.dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(runtime.device.type, (runtime.world,))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def is_sharded(t):
    """Whether t is a DTensor. Asked by attribute, since importing the class takes a second."""
    return hasattr(t, "device_mesh")


def local(t):
    """The part of a tensor that this rank holds: all of it, unless FSDP sharded it."""
    return t.to_local() if is_sharded(t) else t


def gather(t, like):
    """The local part of a tensor laid out as parameter `like` -> the whole, on every rank."""
    if not is_sharded(like):
        return t
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        t, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return whole.full_tensor()


def own_rows(t, like):
    """The inverse of `gather`: whole tensor -> the part of this rank."""
    if not is_sharded(like):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None).to_local()


def grad_norm(params):
    """Euclidean norm of all gradients as one vector, over all shards -> scalar float32."""
    norms = torch._foreach_norm([local(p.grad).float() for p in params])
    square = torch.stack(norms).square().sum()
    if is_sharded(params[0]):
        dist.all_reduce(square)
    return square.sqrt()
