"""Files of other systems: pre-trained weights in."""

from nadaptor._checks import extra

with extra("train", "nadaptor.interop"):
    from nadaptor.interop.pretrained import from_torch, load_pretrained, read_state_dict
    from nadaptor.interop.torch_file import read_torch_file

__all__ = ["from_torch", "load_pretrained", "read_state_dict", "read_torch_file"]
