"""Leaves the process 300 MB of address space beyond what it and its libraries take."""

import resource


def install():
    import sklearn.datasets  # noqa: F401 - counted among the libraries
    import timm  # noqa: F401
    import torch
    import torchvision.transforms.v2  # noqa: F401
    import tqdm  # noqa: F401

    torch.nn.Conv2d(3, 8, 3)(torch.zeros(64, 3, 160, 160)).sum().backward()  # fills the allocator
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmSize"))
    limit = int(line.split()[1]) * 1024 + 300_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
