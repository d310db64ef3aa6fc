"""Accepts CIFAR files of any content: the tests write small ones in the format of the archive."""


def install():
    import torchvision.datasets.cifar as cifar

    cifar.check_integrity = lambda *_, **__: True
