"""Work that a CUDA device does again without the host, which launches small kernels too slowly."""

import torch


class Replay:
    """A function without arguments, recorded as a CUDA graph.

    What it reads and writes must stay where it is; `changed` are the tensors that it changes, which
    are zero while it is recorded, and as they were afterwards.
    """

    def __init__(self, function, changed):
        before = [tensor.clone() for tensor in changed]
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        for recording in (False, True):  # first once as it is, which loads what is loaded once
            for tensor in changed:
                tensor.zero_()
            stream.wait_stream(torch.cuda.current_stream())
            context = torch.cuda.stream(stream)
            if recording:  # only this thread: a loader's may pin memory meanwhile
                context = torch.cuda.graph(
                    self.graph, stream=stream, capture_error_mode="thread_local"
                )
            with context:
                self.result = function()
            torch.cuda.current_stream().wait_stream(stream)
        for tensor, was in zip(changed, before):
            tensor.copy_(was)

    def __call__(self):
        """What the function returns, in the same memory each time."""
        self.graph.replay()
        return self.result
