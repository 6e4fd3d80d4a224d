"""transformers computes norms, softmax and routers in float32 whatever the dtype of a model; here in float64."""

import torch


def double_throughout(monkeypatch):
    """Let casts to float32 keep float64, so that a model in float64 computes everything in it."""
    to, kind, softmax, method = torch.Tensor.to, torch.Tensor.type, torch.nn.functional.softmax, torch.Tensor.softmax

    def kept(dtype, x):
        return x.dtype if x.dtype == torch.float64 and dtype == torch.float32 else dtype

    def cast(self, *args, **options):
        if args and isinstance(args[0], torch.dtype):
            args = (kept(args[0], self), *args[1:])
        if "dtype" in options:
            options["dtype"] = kept(options["dtype"], self)
        return to(self, *args, **options)

    def soft(plain):
        def run(x, *args, **options):
            if "dtype" in options:
                options["dtype"] = kept(options["dtype"], x)
            return plain(x, *args, **options)

        return run

    def typed(self, *args):
        return self if args and kept(args[0], self) == self.dtype else kind(self, *args)

    monkeypatch.setattr(torch.Tensor, "to", cast)
    monkeypatch.setattr(torch.Tensor, "type", typed)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to(self, torch.float32)
    )
    monkeypatch.setattr(torch.Tensor, "softmax", soft(method))
    monkeypatch.setattr(torch.nn.functional, "softmax", soft(softmax))
    monkeypatch.setattr(torch, "softmax", soft(torch.softmax))
