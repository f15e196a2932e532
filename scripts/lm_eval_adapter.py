"""Our models as lm-evaluation-harness wants them (EleutherAI; tested with lm-eval 0.4.13)."""

from itertools import groupby

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from store.contract import ConfigError, DataError
from load_model import Trained
from sample import encode_prompt, stream
from scoring import Scores, Window, batches, score

Request = tuple[tuple[str, str], list[int], list[int]]  # texts; tokens before, tokens to score


class OurModel(TemplateLM):
    """Scores and goes on with texts; TemplateLM cuts tokens between context and continuation."""

    def __init__(self, trained: Trained, batch_size: int):
        super().__init__()
        self.trained = trained
        self.context = trained.cfg.sequence_length
        self.batch_size = batch_size
        self._device = trained.device

    @property
    def eot_token_id(self) -> int | None:
        return self.trained.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text: the end token, or else a new line."""
        return encode_prompt(self.trained, "")[-1]

    def tok_encode(self, string: str, **kwargs) -> list[int]:
        """Ids of a text, none of them special."""
        return self.trained.tokenizer.encode(string).tolist()

    def score(self, windows: list[Window]) -> list[Scores]:
        """Scores of the windows. Those of like length are computed together, the longest first."""
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))
        rows = [windows[i] for i in order]
        found = [None] * len(windows)
        for i, scores in zip(order, score(self.trained.model, rows, self.batch_size)):
            found[i] = scores
        return found

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """For each continuation its log-probability, and whether each of its tokens is likeliest.

        Of the context the last tokens stay that the model can see. Raises DataError.
        """
        windows = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.context:
                raise DataError(
                    f"continuation {texts[1]!r}: expected 1 to SEQUENCE_LENGTH={self.context} "
                    f"tokens, found {len(continuation)}; leave this task out"
                )
            tokens = np.array((context + continuation)[-(self.context + 1) :])
            windows.append(Window(tokens, len(continuation)))
        return [
            (float(scores.logp.astype(np.float64).sum()), bool(scores.is_likeliest.all()))
            for scores in self.score(windows)
        ]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probabilities of whole texts, in lm-eval's own windows."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.context, 1)
            for inputs, targets in pairs:
                windows.append(Window(np.array(inputs + targets[-1:]), len(targets)))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, scores in zip(owners, self.score(windows)):
            sums[owner] += float(scores.logp.astype(np.float64).sum())
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """How the model goes on with each text, until a stop string or the end token."""
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        for _, same in groupby(order, key=lambda i: repr(requests[i].args[1])):
            for batch in batches(same, self.batch_size):
                prompts = [requests[i].args[0] for i in batch]
                answers = self.answer(prompts, requests[batch[0]].args[1], seed=batch[0])
                for i, answer in zip(batch, answers):
                    texts[i] = answer
        return texts

    def answer(self, prompts: list[str], options: dict, seed: int) -> list[str]:
        """One text for each prompt. A long prompt loses its beginning, to leave room."""
        options = normalize_gen_kwargs(options)
        steps = options["max_gen_toks"]
        room = max(self.context - steps, (self.context + 1) // 2)
        rows = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        texts = [""] * len(prompts)
        chosen = {
            "temperature": options.get("temperature", 1.0 if options["do_sample"] else 0.0),
            "top_k": max(0, options.get("top_k") or 0),  # -1 is all, too
            "top_p": options.get("top_p", 1.0),
        }
        stops = [stop for stop in options["until"] if stop]
        for new in stream(self.trained, rows, steps, stops, seed=seed, **chosen):
            texts = [text + more for text, more in zip(texts, new)]
        return texts


def run_tasks(
    trained: Trained, names: str, batch_size: int, limit: int | None, include_path: str | None
) -> dict:
    """Results of a comma list of tasks: {"lm_eval": its version, "limit": ..., task: {metric:
    value}, ...}. Raises ConfigError for an unknown task, DataError for one without its data."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in wanted if not manager.match_tasks([name])]
    if unknown or not wanted:
        raise ConfigError(
            f"--tasks {names}: lm-eval {lm_eval.__version__} has no task "
            f"{', '.join(unknown) or 'without a name'}; lm-eval ls tasks lists them, "
            "--include-path DIR adds others"
        )
    try:
        done = lm_eval.simple_evaluate(
            model=OurModel(trained, batch_size),
            tasks=manager.match_tasks(wanted),
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"--tasks {names}: lm-eval {lm_eval.__version__} could not get them "
            f"({type(error).__name__}: {reason}); install or fetch what is missing"
        ) from None
    results = {task: measured(task, done) for task in done["results"]}
    return {"lm_eval": lm_eval.__version__, "limit": limit, **results}


def measured(task: str, done: dict) -> dict:
    """Metrics of a task under lm-eval's names, metric,filter where there is a filter; and of how
    many examples, after how many examples in the prompt. None for what lm-eval does not know."""
    figures = {}
    for name, value in done["results"][task].items():
        if "," in name:  # not its names and sizes
            figures[name.removesuffix(",none")] = None if value == "N/A" else value
    figures["examples"] = done["n-samples"].get(task, {}).get("effective")
    figures["n_shot"] = done["n-shot"].get(task)
    return figures
