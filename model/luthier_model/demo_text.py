"""Generates the text that the demo model learns: short documents, the same for the same generator.

About half are tasks on words: copying, spelling, moving letters. The rest are sentences, lists,
records and questions, as plain text and as conversations.
"""

from collections.abc import Callable
from random import Random

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


def _split(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _split("""
brave bright calm clean clever cold dark deep early fair fresh gentle golden grand happy hard
heavy honest kind large late lazy little local long loud lucky neat new noisy old pale proud quick
quiet rare rich round sharp short silent simple slow small smart soft strange strong sunny sweet
tall tiny warm wild wise wooden young
""")
_NOUNS = _split("""
apple arrow autumn baker barrel basket beach bell bird boat book bottle bread bridge brother
bucket butter button candle castle chair cheese cherry city clock cloud coat coin corner cotton
crown desert dinner doctor dog door dragon dream engine evening farmer feather finger fire flag
flower forest fox friend fruit garden ghost gift glass hammer harbor hat hill honey horse house
island jacket kettle key kitchen kite ladder lake lamp leaf lemon letter lion map market meadow
mirror money moon morning mountain mouse music night ocean owl paper park path pencil piano
picture pillow planet plate pocket potato queen rabbit rain ribbon river road robot rocket roof
rose sailor school shadow ship shoe silver sister sky snow song spoon spring star station stone
storm story street sugar summer sun table teacher tiger tower town train tree tunnel uncle valley
village voice wagon wall water whale wheel window winter wolf
""")
_VERBS = _split("""
builds carries catches cleans counts draws enjoys feeds finds follows guards hears helps hides
holds keeps likes makes meets moves needs opens paints pulls reaches remembers sees sells sends
shows takes teaches tells throws touches turns visits wants washes watches
""")
_NAMES = _split("""
Ada Ben Clara David Elena Felix Grace Henry Ida Jack Karl Lily Max Nina Oscar Paul Rosa Sam Tom
Vera
""")
_CITIES = _split("""
Athens Berlin Boston Cairo Dublin Lima Lisbon London Madrid Oslo Paris Prague Rome Tokyo Vienna
""")
_COLORS = _split("black blue brown gray green orange pink red white yellow")
_NUMBERS = _split("zero one two three four five six seven eight nine ten")

# Made-up words keep the model from learning the lists above by heart instead of their letters.
_ONSETS = _split("""
b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sc sh sk sl sm sn sp st sw t
th tr tw v w wh y z
""")
# Pairs only: with single vowels some of the made-up words are rude ones.
_VOWELS = _split("ai au ea ei eo ia ie io oa oi ou ua ui")
_CODAS = ["", *_split("b d f g k l ll lk m mp n nd ng nk nt p r rd rk rm rn s sh sk st t th x y")]
_ENDINGS = _split("e er ing ed y le ion ics ar al et ana")

_GREETINGS = {
    "hello": "Hello! How can I help you?",
    "hi": "Hi! What can I do for you?",
    "good morning": "Good morning! How are you today?",
    "how are you": "I am well, thank you.",
    "who are you": "I am a tiny demo model.",
    "what can you do": "I can answer a few short questions.",
    "thank you": "You are welcome.",
    "goodbye": "Goodbye! Have a nice day.",
}

_WORD_TASKS: dict[str, Callable[[str], str]] = {
    "Copy": lambda word: word,
    "Twice": lambda word: f"{word} {word}",
    "Uppercase": str.upper,
    "Reverse": lambda word: word[::-1],
    "Spell": "-".join,
    "First letter": lambda word: word[0],
    "First letter last": lambda word: f"{word[1:]}-{word[0]}",
}
_TASK_WEIGHTS = [4, 2, 1, 1, 1, 1, 1]
"""Copying is what the other tasks build on."""


def document(random: Random) -> str:
    """One document of about 5 to 60 tokens, without the end-of-text token that follows it."""
    kind: Callable[[Random], str] = random.choices(
        [_echo, _words_task, _pairs_task, _exchange, _sentences, _record, _list],
        weights=[8, 3, 2, 5, 2, 1, 1],
    )[0]
    return kind(random)


def chat_turn(role: str, content: str) -> str:
    """One finished turn of a conversation, as the demo model's chat template writes it."""
    return f"{IM_START}{role}\n{content}{IM_END}\n"


def _word(random: Random) -> str:
    if random.random() < 0.5:
        return random.choice(random.choice((_ADJECTIVES, _NOUNS)))
    made_up = "".join(
        random.choice(part) for part in (_ONSETS, _VOWELS, _CODAS) * random.choice((1, 1, 2))
    )
    return made_up + random.choice(_ENDINGS) if random.random() < 0.5 else made_up + "e"


def _words(random: Random) -> list[str]:
    return [_word(random) for _ in range(random.choice((1, 1, 2, 2, 3)))]


def _task(random: Random) -> tuple[str, Callable[[str], str]]:
    return random.choices(list(_WORD_TASKS.items()), weights=_TASK_WEIGHTS)[0]


def _echo(random: Random) -> str:
    """A few words, several times over: the shortest way to learn to copy."""
    words = [_word(random) for _ in range(random.choice((2, 3, 4)))]
    return " ".join(words * random.choice((3, 4)))


def _words_task(random: Random) -> str:
    """One task on one to three words; it is done word by word."""
    name, task = _task(random)
    words = _words(random)
    return f"{name}: {' '.join(words)}\nAnswer: {' '.join(task(word) for word in words)}"


def _pairs_task(random: Random) -> str:
    """Examples of one task under made-up headings, whose meaning only the examples tell."""
    _, task = _task(random)
    before, after = _word(random).capitalize(), _word(random).capitalize()
    pairs = [_words(random)[:2] for _ in range(random.choice((2, 3)))]
    return "\n\n".join(
        f"{before}: {' '.join(words)}\n{after}: {' '.join(task(word) for word in words)}"
        for words in pairs
    )


def _sentence(random: Random) -> str:
    subject = random.choice((random.choice(_NAMES), _thing(random), _thing(random)))
    sentence = f"{subject} {random.choice(_VERBS)} {_thing(random)}."
    return sentence[0].upper() + sentence[1:]


def _thing(random: Random) -> str:
    return f"the {random.choice(_ADJECTIVES)} {random.choice(_NOUNS)}"


def _sentences(random: Random) -> str:
    return " ".join(_sentence(random) for _ in range(random.choice((1, 2, 3))))


def _list(random: Random) -> str:
    return ", ".join(random.choice(_NOUNS) for _ in range(random.randint(3, 6)))


def _record(random: Random) -> str:
    fields = {
        "Name": random.choice(_NAMES),
        "City": random.choice(_CITIES),
        "Age": str(random.randint(1, 99)),
        "Color": random.choice(_COLORS),
        "Pet": random.choice(_NOUNS),
    }
    names = random.sample(sorted(fields), random.randint(2, 4))
    return "\n".join(f"{name}: {fields[name]}" for name in names)


def _question(random: Random) -> tuple[str, str]:
    """A question that holds what its answer needs, or a greeting."""
    name, noun, color = random.choice(_NAMES), random.choice(_NOUNS), random.choice(_COLORS)
    first = random.randint(0, 5)
    second = random.randint(0, 5)
    return random.choice(
        [
            random.choice(list(_GREETINGS.items())),
            (f"The {noun} is {color}. What color is the {noun}?", f"The {noun} is {color}."),
            (f"{name} has a {noun}. Who has a {noun}?", f"{name} has a {noun}."),
            (f"What is {_NUMBERS[first]} plus {_NUMBERS[second]}?", _NUMBERS[first + second]),
            _spoken_task(random),
        ]
    )


def _spoken_task(random: Random) -> tuple[str, str]:
    name, task = _task(random)
    word = _word(random)
    return f"{name}: {word}", task(word)


def _exchange(random: Random) -> str:
    """A question and its answer, in plain text or as a conversation."""
    question, answer = _question(random)
    style = random.random()
    if style < 0.3:
        return f"Question: {question}\nAnswer: {answer}"
    if style < 0.6:
        return f"User: {question}\nAssistant: {answer}"
    # The last turn has no end here: the end-of-text token is the end of a turn.
    return chat_turn("user", question) + f"{IM_START}assistant\n{answer}"
