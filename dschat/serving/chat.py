"""A conversation with a model in a terminal or a pipe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from dschat.console.text import printable
from dschat.data.cells import BadRow
from dschat.data.comparisons import Turn
from dschat.data.messages import turns
from dschat.errors import UserError
from dschat.serving.lines import append_line, last_line
from dschat.serving.scorer import Scorer
from dschat.serving.settings import DEFAULTS, checked, completed, sampling_of
from dschat.serving.speaker import Speaker, SpokenAnswer

ENDS = {"length": "cut off at max_tokens", "interrupted": "stopped"}


@dataclass
class Conversation:
    """What was answer, a system message before it if there is one."""

    system: str = ""
    exchanges: list[tuple[str, str]] = field(default_factory=list)
    """Questions and their answers."""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All of it."""
        head = [Turn("system", self.system)] if self.system else []
        pairs = [(Turn("user", asked), Turn("assistant", answer)) for asked, answer in self.exchanges]
        return (*head, *chain.from_iterable(pairs))

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it in the layout `messages` of docs/data.md."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]

    @staticmethod
    def of_messages(value: object, name: str) -> "Conversation":
        """The conversation of a list of messages. Raises `UserError` where it is another."""
        try:
            found = list(turns(value, name))
        except BadRow as error:
            raise UserError(f"{error}.") from error
        system = found.pop(0).content if found[0].role == "system" else ""
        if [turn.role for turn in found] != ["user", "assistant"] * (len(found) // 2):
            raise UserError(f"{name}: questions and answers must alternate, and end with an answer.")
        texts = [turn.content for turn in found]
        return Conversation(system, list(zip(texts[::2], texts[1::2], strict=True)))


class Chat:
    """Questions and commands in, answers out, of which `write` gets the text as it comes."""

    def __init__(
        self,
        speaker: Speaker,
        settings: dict[str, float],
        write: Callable[[str], None],
        *,
        system: str = "",
        scorer: Scorer | None = None,
    ) -> None:
        self.conversation, self.settings = Conversation(system), settings
        self._speaker, self._write, self._scorer = speaker, write, scorer
        self._sample = 0

    def hear(self, line: str) -> bool:
        """Answer a question, or do as a command says; False once the user wants to leave.

        Raises `UserError` for what cannot be done.
        """
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name.startswith("/"):
            command = COMMANDS.get(name)
            if command is None:
                raise UserError(f"there is no command {name}; /help lists them.")
            command(self, rest.strip())
        elif line.strip():
            self._ask(line.strip(), sample=0)
        return True

    def _ask(self, question: str, *, sample: int) -> None:
        prompt = (*self.conversation.turns, Turn("user", question))
        sampling, positions = sampling_of(self.settings), self._speaker.positions
        room = None if positions is None else positions - sampling.max_answer_length
        ids, is_cut = self._speaker.read(prompt, max_tokens=room)
        if room is not None and len(ids) > room:
            raise UserError(
                f"the question has {len(ids)} tokens and the model {positions} positions, {room} beside "
                "max_tokens; ask less, or lower max_tokens."
            )
        if is_cut:
            self._tell("the first exchanges are left out: the model has no room for them")
        answer = self._speaker.answer(
            ids, sampling, lambda piece: self._write(printable(piece)), sample=sample
        )
        self._write("\n")
        facts = [ENDS[answer.end]] if answer.end in ENDS else []
        if self._scorer is not None and answer.ids:
            facts.append(self._scorer.described(prompt, ids, answer))
        self._keep(question, answer, sample)
        if facts:
            self._tell(", ".join(facts))

    def _keep(self, question: str, answer: SpokenAnswer, sample: int) -> None:
        """Add the exchange; without a word of an answer there is none, and no template shows one."""
        self._sample = sample
        if answer.text:
            self.conversation.exchanges.append((question, answer.text))
        else:
            self._tell("no answer, so that the question is not kept")

    def _tell(self, fact: str) -> None:
        self._write(f"[{printable(fact)}]\n")

    def help(self, _: str) -> None:
        """this list"""
        for name, command in COMMANDS.items():
            self._write(f"{name:10} {command.__doc__}\n")
        self._write(f"{'/quit':10} leave (also Ctrl-D); Ctrl-C stops an answer\n")

    def reset(self, _: str) -> None:
        """forget the conversation, and keep the system message"""
        self.conversation.exchanges.clear()

    def system(self, text: str) -> None:
        """TEXT sets the system message and forgets the conversation; without TEXT shows it"""
        if text:
            self.conversation = Conversation(text)
        else:
            self._tell(self.conversation.system or "no system message")

    def undo(self, _: str) -> None:
        """take back the last question and its answer"""
        self._last_question()

    def retry(self, _: str) -> None:
        """another answer to the last question"""
        self._ask(self._last_question(), sample=self._sample + 1)

    def _last_question(self) -> str:
        if not self.conversation.exchanges:
            raise UserError("nothing was said yet.")
        return self.conversation.exchanges.pop()[0]

    def save(self, file: str) -> None:
        """FILE adds the conversation to a file of JSON lines, which step 1 reads"""
        if not self.conversation.exchanges or not file:
            raise UserError("/save FILE keeps a conversation once something was said.")
        try:
            append_line(Path(file), {"messages": self.conversation.messages})
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error}.") from error

    def load(self, file: str) -> None:
        """FILE goes on from the last conversation in it"""
        row = last_line(Path(file))
        if not isinstance(row, dict):
            raise UserError(f'the last line of {file} is no object with "messages".')
        self.conversation = Conversation.of_messages(row.get("messages"), f'"messages" of {file}')

    def set(self, text: str) -> None:
        """NAME VALUE changes temperature, top_p, top_k, max_tokens or seed; alone shows them"""
        if text:
            name, _, value = text.partition(" ")
            if name not in DEFAULTS:
                raise UserError(f"there is no setting {name!r}; there are {', '.join(DEFAULTS)}.")
            changed = {**self.settings, name: checked(name, value.strip())}
            self.settings = completed(changed, self._speaker.positions)
        self._tell(", ".join(f"{name} {value:g}" for name, value in self.settings.items()))


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/help": Chat.help,
    "/reset": Chat.reset,
    "/system": Chat.system,
    "/undo": Chat.undo,
    "/retry": Chat.retry,
    "/save": Chat.save,
    "/load": Chat.load,
    "/settings": Chat.set,
}


def lines_of_user(prompt: str) -> Iterator[str]:
    """What the user types, up to the end of input; a line that ends with a backslash goes on in the next.

    `prompt` is shown in a terminal. Ctrl-C drops the line.
    """
    with suppress(EOFError, ImportError):
        import readline  # noqa: F401  # lines can be edited
    held: list[str] = []
    while True:
        try:
            line = input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            held = []
            continue
        held.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(held)
            held = []


def talk(chat: Chat) -> None:
    """Converse until the user leaves."""
    for line in lines_of_user("you> "):
        try:
            if not chat.hear(line):
                return
        except UserError as error:
            print(error, flush=True)
