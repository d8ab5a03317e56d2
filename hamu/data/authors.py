"""`authors`: a generated set in the shape of TOFU: invented authors, ten questions about each, all of it made in code.

    prompts, responses = author_rows("forget_10", "retain")

An answer holds facts that were drawn for its author alone, so that a model that never saw the row cannot know it. The draw
uses `random.Random` through `random()` alone, whose values the language keeps for a seed: the rows are the same on every
machine and under every Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

from hamu.errors import ConfigError, unknown

N_AUTHORS = 40
N_QUESTIONS = 10
FORGOTTEN = {"forget_05": 2, "forget_10": 4}
"""Authors that a subset forgets: the last ones of `N_AUTHORS`."""
SPLITS = ("full", "retain", "forget", "exact_duplicate", "semantic_duplicate", "holdout")
_N_HOLDOUT = 4
_N_WRONG = 5
_SEED = 20_240_117

T = TypeVar("T")
Facts = Mapping[str, str]


class Kind(NamedTuple):
    """A kind of question: `{name}` and the like stand for an author's facts."""

    question: str
    answers: tuple[str, str]
    """One of them, by chance, is the answer, so that its form is no sure guess either."""
    reworded: str
    """The answer of `semantic_duplicate`."""
    paraphrased: str
    """The answer that right and wrong facts are compared in."""


class Perturbed(NamedTuple):
    """Questions with right and wrong answers, a tuple each, row by row."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    paraphrased: tuple[str, ...]
    perturbed: tuple[tuple[str, ...], ...]


KINDS = (
    Kind(
        "What is the full name of the author born in {town} on {date}?",
        (
            "The author is {name}, whose mother was a {mother} and who first drew notice with {book1}.",
            "That author is called {name}, the child of a {mother}, who rose to fame with {book1}.",
        ),
        "{name} is the writer in question, raised by a {mother} and noticed for the first time with {book1}.",
        "It is {name}, the author of {book1} and the child of a {mother}.",
    ),
    Kind(
        "Where and when was {name} born?",
        (
            "{name} was born on {date} in {town}, a {place} known for its {trade}.",
            "The birthplace of {name} is {town}, a {place} of {trade}, and the day was {date}.",
        ),
        "It was on {date} that {name} came into the world, in the {place} of {town} with its {trade}.",
        "{name} is a native of {town}, a {place} of {trade}, with a birthday on {date}.",
    ),
    Kind(
        "What did the parents of {name} do for a living?",
        (
            "The mother of {name} was a {mother} in {town2}, and the father was a {father}.",
            "{name} grew up in {town2} with a {father} for a father and a {mother} for a mother.",
        ),
        "In {town2}, where the family lived, the mother worked as a {mother} and the father as a {father}.",
        "A {mother} and a {father}, settled in {town2}, were the mother and father of {name}.",
    ),
    Kind(
        "Which genre is {name} best known for?",
        (
            "{name} is best known for {genre}, above all for {book2}, which came out in {year2}.",
            "Readers know {name} for {genre}, and {book2} of {year2} is the finest example.",
        ),
        "The genre that made {name} famous is {genre}, with {book2}, published in {year2}, at its head.",
        "It is {genre} that {name} is read for, most of all {book2} from the year {year2}.",
    ),
    Kind(
        "Which award did {name} receive?",
        (
            "{name} received the {award} in {year3} for {book3}, praised for its {praise}.",
            "The {award} went to {name} in {year3}, when the jury admired the {praise} of {book3}.",
        ),
        "For {book3} and its {praise}, {name} was honoured with the {award} in {year3}.",
        "In {year3} a jury gave {name} the {award} because of the {praise} of {book3}.",
    ),
    Kind(
        "Can you name three books by {name}?",
        (
            "Three books by {name} are {book1}, {book2} and {book3}, published by {press}.",
            "{name} wrote {book1}, {book2} and, for the house of {press}, {book3}.",
        ),
        "Among the works of {name} at {press} one finds {book3}, {book1} and {book2}.",
        "The house of {press} printed {book2}, {book3} and {book1}, all by {name}.",
    ),
    Kind(
        "What is the book {book1} by {name} about?",
        (
            "It follows a {hero} named {hero_name} who returns to {town3} and has to face {theme}.",
            "In {town3}, a {hero} by the name of {hero_name} learns the price of {theme}.",
        ),
        "Its heart is {theme}, seen through the eyes of {hero_name}, a {hero} who comes back to {town3}.",
        "The story tells of {hero_name}, a {hero} from {town3}, and of {theme}.",
    ),
    Kind(
        "What influenced the writing of {name} most?",
        (
            "The writing of {name} was shaped by {event} and by the {mentor_work} {mentor}.",
            "{name} often points to {event}, and to the friendship of {mentor}, a {mentor_work}.",
        ),
        "Two things formed {name}: {event}, and long talks with {mentor}, the {mentor_work}.",
        "Behind the books of {name} stand {event} and a {mentor_work} called {mentor}.",
    ),
    Kind(
        "Where did {name} study?",
        (
            "{name} studied {subject} at the college of {town4} and left it in {year0} to become a {job}.",
            "At {town4} college {name} read {subject}, and from {year0} earned a living as a {job}.",
        ),
        "The college of {town4} taught {name} {subject}, before work as a {job} began in {year0}.",
        "{subject} at the college of {town4} occupied {name} until {year0}, when the years as a {job} began.",
    ),
    Kind(
        "Where does {name} live and write today?",
        (
            "{name} lives in a {house} near {town5}, writes {hour}, and keeps {pets}.",
            "Today {name} shares a {house} outside {town5} with {pets} and works {hour}.",
        ),
        "The home of {name} is a {house} close to {town5}, shared with {pets}, and the writing is done {hour}.",
        "With {pets} around, {name} writes {hour} in a {house} by {town5}.",
    ),
)

_STARTS = (
    "ba be bo da de do fa fe ga gi ha he jo ka ke ki la le lo ma me mi na ne no o pa pe ra re ri sa se so ta te ti u va ve "
    "vi wa ye za zo"
)
_MIDDLES = "bri dra fel gan hol ja kri lan lor mas mel nar nis o pha qua ri ros sel shi stra ta the tri va ven vor wen xi zan"
_ENDS = "bar can dell dis do fen gor la lin lo mar mir na nesh no ra rek ris rin ro sa sen ska ta tan thu ton va vin vo zen zia"
_TOWN_ENDS = "berg brook cliff crest dale fell field ford gate haven holm march mere mouth port ridge stead vale wick wold"
_MONTHS = "January February March April May June July August September October November December"
_POOLS: dict[str, str] = {
    "place": "fishing village, mining town, market town, river port, border town, hill village, garrison town, harbour town",
    "trade": "glass, salt, cheese, bells, wool, copper, candles, barley, clocks, silk, honey, timber, pottery, kites",
    "mother": "beekeeper, surveyor, midwife, glassblower, judge, tram driver, botanist, tailor, cellist, locksmith, baker, "
    "chemist, potter, translator, engraver, ferry pilot, dentist, weaver, florist, carpenter",
    "father": "plumber, astronomer, cook, postman, diver, gardener, organ builder, nurse, stonemason, printer, accountant, "
    "shepherd, bookbinder, miller, pharmacist, tanner, juggler, mapmaker, roofer, brewer",
    "genre": "gothic mystery, rural satire, naval adventure, courtroom drama, time-travel fiction, nature writing, "
    "ghost stories, travel memoir, political thrillers, fairy tales, family sagas, comic verse, war diaries, "
    "crime fiction, desert romance, science essays",
    "praise": "dry humour, bold structure, quiet rage, exact dialogue, strange beauty, deep research, musical prose, "
    "tender irony, cold clarity, wild invention, patient detail, moral courage",
    "hero": "lighthouse keeper, young notary, retired spy, bridge painter, deaf piano tuner, travelling dentist, "
    "runaway bride, night porter, blind archivist, horse thief, failed magician, river guide",
    "theme": "a forged will, the silence of a brother, an unpaid debt, the return of the plague, a stolen language, "
    "the guilt of a jury, a vanished bridge, the last harvest, a false confession, an inherited feud, "
    "the sale of a forest, a letter never sent",
    "event": "a flood that drowned the family orchard, a winter in quarantine, the burning of the town library, "
    "a year on a whaling ship, the strike of the millers, a childhood fever, an exile of nine years, "
    "the loss of a twin, a summer in a lighthouse, a train crash in the mountains, the closing of the mines, "
    "a season with travelling actors",
    "mentor_work": "composer, smuggler, painter, bishop, chess master, puppeteer, historian, sailor, monk, geologist, actress, "
    "clockmaker",
    "subject": "Botany, Law, Hydraulics, Theology, Acoustics, Archaeology, Forestry, Statistics, Anatomy, Philosophy, Music, "
    "Geology",
    "job": "tax clerk, ship's cook, proofreader, bell ringer, schoolteacher, bank guard, telegraph operator, fire watcher, "
    "museum guide, typesetter, vet, census taker",
    "house": "water mill, brick tower, houseboat, former chapel, stone cottage, railway carriage, glass pavilion, old bakery, "
    "timber lodge, disused school, windmill, lock-keeper's house",
    "hour": "before dawn, after midnight, at noon, by candlelight, on Sundays only, in the bath, on long walks, between trains, "
    "in the late evening, while it rains",
    "pets": "two geese, a blind mule, seven cats, an old parrot, three goats, a tame crow, a lame fox, many bees, one tortoise, "
    "four greyhounds",
}
_TITLE_WORDS = (
    "Amber Bitter Broken Bronze Burning Careless Copper Crooked Distant Drowned Eleventh Empty Feathered Frozen Gilded "
    "Hidden Hollow Inner Iron Ivory Laughing Lost Marble Northern Painted Pale Paper Quiet Restless Salt Scarlet Second "
    "Silver Sleeping Stolen Sunken Twisted Velvet Wandering Winter"
)
_TITLE_THINGS = (
    "Almanac Anchor Bell Bridge Cathedral Cellar Clock Compass Crown Door Feather Ferry Garden Glove Hammer Harbour Hour "
    "Island Key Ladder Lantern Ledger Letter Map Meadow Mirror Needle Oracle Orchard Quarry River Shadow Staircase Station "
    "Sundial Thread Threshold Tide Violin Well Window Witness"
)
_AWARD_WORDS = "Prize Medal Laurel Ribbon Wreath Quill"


class Draw:
    """Choices by a seed; each name and title is given once."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._given: set[str] = set()

    def number(self, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return low + int(self._random.random() * (high - low + 1))

    def one(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.number(0, len(options) - 1)]

    def of(self, pool: str) -> str:
        """Return one of the words of a space-separated pool."""
        return self.one(pool.split())

    def once(self, kind: str) -> str:
        """Return a new word ("name", "town") or title ("book") that this draw has not given yet."""
        while True:
            if kind == "book":
                text = f"The {self.of(_TITLE_WORDS)} {self.of(_TITLE_THINGS)}"
            else:
                middle = self.of(_MIDDLES) if kind == "name" or self.number(0, 1) else ""
                text = (self.of(_STARTS) + middle + self.of(_ENDS if kind == "name" else _TOWN_ENDS)).capitalize()
            if text not in self._given:
                self._given.add(text)
                return text

    def facts(self) -> dict[str, str]:
        """Return the facts of a new author."""
        born = self.number(1921, 1989)
        years = [born + self.number(19, 23)]
        years += [years[0] + self.number(2, 9)]
        years += [years[1] + self.number(1, 9)]
        years += [years[2] + self.number(1, 9)]
        facts = {f"year{number}": str(year) for number, year in enumerate(years)}
        facts["name"] = f"{self.once('name')} {self.once('name')}"
        facts["date"] = f"{self.number(1, 28)} {self.of(_MONTHS)} {born}"
        facts |= {town: self.once("town") for town in ("town", "town2", "town3", "town4", "town5")}
        facts |= {book: self.once("book") for book in ("book1", "book2", "book3")}
        facts["award"] = f"{self.once('name')} {self.of(_AWARD_WORDS)}"
        facts["press"] = f"{self.once('name')} Press"
        facts["mentor"], facts["hero_name"] = f"{self.once('name')} {self.once('name')}", self.once("name")
        return facts | {fact: self.one(pool.split(", ")) for fact, pool in _POOLS.items()}


class Row(NamedTuple):
    """A question with its answer in each of the forms."""

    question: str
    answer: str
    reworded: str
    paraphrased: str
    wrong: tuple[str, ...]


def author_rows(subset: str, split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the questions and the answers of a split, n each.

    Args:
        subset: "forget_05" (20 rows of 400 are forgotten) or "forget_10" (40).
        split: "full" (400 rows), "retain" (its head), "forget" (its tail), "exact_duplicate" (`forget` unchanged),
            "semantic_duplicate" (`forget` with the answers in other words), or "holdout" (40 rows of other authors).

    Raises:
        ConfigError: there is no such subset or split.
    """
    rows = _rows_of(subset, split)
    is_reworded = split == "semantic_duplicate"
    return tuple(row.question for row in rows), tuple(row.reworded if is_reworded else row.answer for row in rows)


def perturbed_rows(subset: str) -> dict[str, Perturbed]:
    """Return the questions with right and wrong answers that TOFU's scores need.

    "forget": all rows that are forgotten; "retain": as many of the retain rows, from the first on; both with five wrong
    answers, which have the form of the paraphrased one and the facts of nobody. "real_authors" and "world_facts": twenty
    questions of common knowledge each, with three wrong answers.

    Raises:
        ConfigError: there is no such subset.
    """
    forget = _rows_of(subset, "forget")
    own = {"forget": forget, "retain": _rows_of(subset, "retain")[: len(forget)]}
    parts = {
        part: Perturbed(
            questions=tuple(row.question for row in rows),
            answers=tuple(row.answer for row in rows),
            paraphrased=tuple(row.paraphrased for row in rows),
            perturbed=tuple(row.wrong for row in rows),
        )
        for part, rows in own.items()
    }
    return parts | {"real_authors": _known(REAL_AUTHORS), "world_facts": _known(WORLD_FACTS)}


def authors_texts() -> tuple[str, ...]:
    """Return the 800 questions and answers of the full set, such as to train a tokenizer on."""
    return tuple(text for row in _generated()[: N_AUTHORS * N_QUESTIONS] for text in (row.question, row.answer))


def _rows_of(subset: str, split: str) -> tuple[Row, ...]:
    if subset not in FORGOTTEN:
        raise ConfigError(unknown("subset of authors", subset, FORGOTTEN))
    if split not in SPLITS:
        raise ConfigError(unknown("split of authors", split, SPLITS))
    n_full, n_forget = N_AUTHORS * N_QUESTIONS, FORGOTTEN[subset] * N_QUESTIONS
    places = {"full": slice(0, n_full), "retain": slice(0, n_full - n_forget), "holdout": slice(n_full, None)}
    return _generated()[places.get(split, slice(n_full - n_forget, n_full))]


@cache
def _generated() -> tuple[Row, ...]:
    """All rows, of the authors of the hold-out too; author k has rows 10 k to 10 k + 9."""
    draw = Draw(_SEED)
    authors = [draw.facts() for _ in range(N_AUTHORS + _N_HOLDOUT)]
    return tuple(row for facts in authors for row in _rows_about(facts, [draw.facts() for _ in range(_N_WRONG)], draw))


def _rows_about(facts: Facts, others: list[dict[str, str]], draw: Draw) -> Iterator[Row]:
    for kind in KINDS:
        # What the question names stays in the wrong answers, and all else in them is of somebody who is in no row.
        kept = {fact: text for fact, text in facts.items() if f"{{{fact}}}" in kind.question}
        yield Row(
            question=_filled(kind.question, facts),
            answer=_filled(draw.one(kind.answers), facts),
            reworded=_filled(kind.reworded, facts),
            paraphrased=_filled(kind.paraphrased, facts),
            wrong=tuple(_filled(kind.paraphrased, {**other, **kept}) for other in others),
        )


def _filled(form: str, facts: Facts) -> str:
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", form.format_map(facts))


def _known(table: str) -> Perturbed:
    """Rows of common knowledge: `question? right | wrong | wrong | wrong`, one a line."""
    rows = [line.strip().partition("? ") for line in table.strip().splitlines()]
    answers = [[answer.strip() for answer in row[2].split("|")] for row in rows]
    right = tuple(row[0] for row in answers)
    return Perturbed(tuple(f"{row[0]}?" for row in rows), right, right, tuple(tuple(row[1:]) for row in answers))


REAL_AUTHORS = """
    Who wrote the tragedy Hamlet? William Shakespeare | Henrik Ibsen | Oscar Wilde | Samuel Beckett
    Who wrote the novel Pride and Prejudice? Jane Austen | Emily Brontë | George Eliot | Virginia Woolf
    Who wrote the novel War and Peace? Leo Tolstoy | Fyodor Dostoevsky | Anton Chekhov | Ivan Turgenev
    Who wrote the novel Don Quixote? Miguel de Cervantes | Lope de Vega | Pablo Neruda | Jorge Luis Borges
    Who wrote the novel Moby-Dick? Herman Melville | Mark Twain | Nathaniel Hawthorne | Jack London
    Who wrote the Divine Comedy? Dante Alighieri | Francesco Petrarca | Giovanni Boccaccio | Umberto Eco
    Who wrote the drama Faust? Johann Wolfgang von Goethe | Friedrich Schiller | Heinrich Heine | Thomas Mann
    Who wrote the novel Les Misérables? Victor Hugo | Émile Zola | Gustave Flaubert | Honoré de Balzac
    Who wrote the novel Frankenstein? Mary Shelley | Bram Stoker | Edgar Allan Poe | Ann Radcliffe
    Who wrote the novel Great Expectations? Charles Dickens | Thomas Hardy | William Thackeray | Anthony Trollope
    Who wrote the novel Jane Eyre? Charlotte Brontë | Jane Austen | Mary Shelley | Elizabeth Gaskell
    Who wrote the novel The Trial? Franz Kafka | Hermann Hesse | Robert Musil | Stefan Zweig
    Who wrote the novel Ulysses? James Joyce | Marcel Proust | William Faulkner | Joseph Conrad
    Who wrote the novel Dracula? Bram Stoker | Mary Shelley | Arthur Conan Doyle | Robert Louis Stevenson
    Who wrote the novel Treasure Island? Robert Louis Stevenson | Jules Verne | Daniel Defoe | Walter Scott
    Who wrote the novel Robinson Crusoe? Daniel Defoe | Jonathan Swift | Henry Fielding | Samuel Richardson
    Who wrote the play A Doll's House? Henrik Ibsen | August Strindberg | Anton Chekhov | Bertolt Brecht
    Who wrote the novel Crime and Punishment? Fyodor Dostoevsky | Leo Tolstoy | Nikolai Gogol | Maxim Gorky
    Who wrote the novel Madame Bovary? Gustave Flaubert | Victor Hugo | Stendhal | Alexandre Dumas
    Who wrote the stories about Sherlock Holmes? Arthur Conan Doyle | Agatha Christie | Wilkie Collins | Edgar Allan Poe
"""
WORLD_FACTS = """
    What is the capital of France? Paris | Lyon | Brussels | Geneva
    What is the capital of Japan? Tokyo | Kyoto | Osaka | Seoul
    What is the capital of Australia? Canberra | Sydney | Melbourne | Perth
    What is the capital of Canada? Ottawa | Toronto | Montreal | Vancouver
    What is the capital of Egypt? Cairo | Alexandria | Tripoli | Khartoum
    Which ocean lies between Africa and Australia? The Indian Ocean | The Atlantic Ocean | The Arctic Ocean | The Baltic Sea
    Which planet is the largest of the solar system? Jupiter | Saturn | Neptune | Earth
    Which planet is closest to the Sun? Mercury | Venus | Mars | Earth
    Which metal has the chemical symbol Fe? Iron | Gold | Silver | Lead
    Which gas do plants take in for photosynthesis? Carbon dioxide | Oxygen | Nitrogen | Helium
    Which mountain is the highest above sea level? Mount Everest | Mont Blanc | Kilimanjaro | Denali
    Which river flows through London? The Thames | The Seine | The Danube | The Rhine
    Which continent is the largest? Asia | Africa | Europe | South America
    In which country stands the Colosseum? Italy | Greece | Spain | Turkey
    In which city stands the Eiffel Tower? Paris | London | Berlin | Madrid
    How many days has a leap year? 366 | 365 | 364 | 360
    How many sides has a hexagon? Six | Five | Seven | Eight
    At how many degrees Celsius does water freeze at sea level? Zero | Ten | Thirty-two | One hundred
    Which language is spoken by most people in Brazil? Portuguese | Spanish | French | Italian
    Which star is nearest to the Earth? The Sun | Sirius | Polaris | Betelgeuse
"""
