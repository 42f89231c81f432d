"""Shared vocabularies of the synthetic sample: people, places, dates, titles and codes."""

# ruff: noqa: SIM905 - word lists are read as text

from __future__ import annotations

import random
from collections.abc import Callable

FIRST = (
    "Ada Alan Alice Amir Ana Anders Astrid Ben Bianca Carl Carla Chen Clara David Dina Elena Eli Emma Erik Fatima "
    "Felix Gloria Grace Hana Hugo Ida Igor Ines Ivan Jack Jana Jonas Julia Karim Kate Lars Laura Leo Lina Luis "
    "Maria Marta Mila Nadia Nils Nora Olga Omar Oscar Paul Petra Priya Rosa Ruth Sam Sara Sofia Tariq Tom Vera "
    "Victor Yuki"
).split()
LAST = (
    "Adams Ahmed Baker Berg Blake Brown Carter Chavez Cohen Costa Cruz Dahl Diaz Dubois Evans Fischer Ford Garcia "
    "Green Hall Hansen Hughes Ito Jensen Jones Kaur Keller Khan Kim Kowalski Larsen Lee Lopez Martin Mendes Meyer "
    "Moore Mori Murphy Nagy Novak Olsen Park Patel Perez Popov Reed Rossi Sato Schmidt Silva Singh Smith Stone "
    "Tanaka Torres Turner Vega Walker Weber White Wong Young"
).split()
CITIES = (
    "Amsterdam, Athens, Austin, Bergen, Berlin, Bogota, Boston, Bristol, Brussels, Cairo, Chicago, Cork, Dakar, "
    "Delhi, Denver, Dublin, Geneva, Genoa, Ghent, Graz, Hanoi, Havana, Helsinki, Kyoto, Lagos, Leeds, Lima, "
    "Lisbon, London, Lyon, Madrid, Malmo, Manila, Miami, Milan, Munich, Nairobi, Naples, New York, Nice, Osaka, "
    "Oslo, Paris, Porto, Prague, Quito, Reno, Riga, Rome, San Diego, San Jose, Seattle, Seoul, Seville, Sofia, "
    "Tampa, Tokyo, Toronto, Tunis, Turin, Utrecht, Vienna, Warsaw, Zurich"
).split(", ")
COUNTRIES = (
    "Argentina, Australia, Austria, Belgium, Brazil, Canada, Chile, China, Denmark, Egypt, Finland, France, "
    "Germany, Ghana, Greece, Hungary, Iceland, India, Ireland, Italy, Japan, Kenya, Mexico, Morocco, Nepal, New "
    "Zealand, Norway, Peru, Poland, Portugal, South Korea, Spain, Sweden, Switzerland, Thailand, Turkey, Uruguay, "
    "Vietnam"
).split(", ")
LANGUAGES = ("Arabic Dutch English French German Greek Hindi Italian Japanese Polish Spanish Swedish Turkish").split()
COLOURS = "red blue green yellow white black purple orange pink silver".split()
MONTHS = ("January February March April May June July August September October November December").split()
ADJECTIVES = (
    "Silent Golden Broken Hidden Crimson Distant Bright Frozen Lonely Wild Ancient Secret Gentle Burning Blue "
    "Last Northern Quiet Royal Stormy"
).split()
NOUNS = (
    "River Garden Tower Road Harbor Forest Island Star Bridge Meadow Winter Lantern Mountain Shadow Ocean Mirror "
    "Field Crown Falcon Valley"
).split()
FIRMS = (
    "Acme Apex Borealis Cobalt Delta Ember Fjord Granite Helix Indigo Juniper Keystone Lumen Meridian Nimbus "
    "Orion Pioneer Quartz Summit Vertex"
).split()
SUFFIXES = "Group Systems Works Partners Industries Labs United Trading".split()


def _title(rng: random.Random) -> str:
    return f"{rng.choice(('', 'The '))}{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1995, 2024)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTVXZ") for _ in range(2))
    return f"{letters}{rng.choice(('', '-'))}{rng.randint(10, 999)}"


TEXTS: dict[str, Callable[[random.Random], str]] = {
    "person": lambda rng: f"{rng.choice(FIRST)} {rng.choice(LAST)}",
    "city": lambda rng: rng.choice(CITIES),
    "country": lambda rng: rng.choice(COUNTRIES),
    "company": lambda rng: f"{rng.choice(FIRMS)} {rng.choice(SUFFIXES)}",
    "title": _title,
    "date": _date,
    "code": _code,
    "language": lambda rng: rng.choice(LANGUAGES),
    "colour": lambda rng: rng.choice(COLOURS),
    "month": lambda rng: rng.choice(MONTHS),
}
"""Kind of a text column -> how one of its values is drawn."""

REPEATING = frozenset({"city", "country", "language", "colour", "month", "company"})
"""Text kinds with few values, so that grouping by them makes sense; lists count as well."""


def number(rng: random.Random, low: float, high: float, step: float) -> str:
    """A number on the grid from `low` to `high`, written as SQL would read it back."""
    steps = round((high - low) / step)
    value = low + rng.randint(0, steps) * step
    if step == round(step) and low == round(low):
        return str(round(value))
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in {"-0", ""} else text
