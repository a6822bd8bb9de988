//! Text of our own making, for machines that have no other: sentences from a small grammar.
//!
//! It has what a small model can learn in a few hundred steps (spelling, agreement, punctuation, names that come
//! back within a paragraph), and is not a substitute for real language: reports say that it was used.

use super::below;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Length of the text, bytes.
const BYTES: usize = 600_000;
/// The text never changes: results on it can be compared between versions.
const SEED: u64 = 0x5eed_7e87;

const NAMES: &[&str] = &[
    "Ada", "Bruno", "Clara", "Daniel", "Edith", "Florian", "Greta", "Henry", "Irene", "Jonas",
    "Katrin", "Leonard", "Martha", "Nils", "Olive", "Peter", "Rosa", "Simon", "Teresa", "Viktor",
];
const PEOPLE: &[&str] = &[
    "baker",
    "captain",
    "carpenter",
    "clockmaker",
    "doctor",
    "farmer",
    "fisherman",
    "gardener",
    "judge",
    "miller",
    "nurse",
    "painter",
    "pilot",
    "potter",
    "printer",
    "sailor",
    "shepherd",
    "surveyor",
    "teacher",
    "weaver",
];
const THINGS: &[&str] = &[
    "barrel", "basket", "bell", "book", "bridge", "candle", "clock", "coat", "door", "engine",
    "garden", "harbour", "hammer", "ladder", "lamp", "letter", "map", "mirror", "orchard", "path",
    "river", "rope", "stone", "table", "tower", "wagon", "well", "wheel", "window", "workshop",
];
const PLACES: &[&str] = &[
    "at the edge of the village",
    "behind the old mill",
    "beside the river",
    "by the north gate",
    "in the market",
    "in the valley",
    "near the lighthouse",
    "on the hill",
    "under the bridge",
    "within the walls",
];
const ADJECTIVES: &[&str] = &[
    "ancient", "bright", "broken", "careful", "cold", "crooked", "empty", "faithful", "grey",
    "heavy", "hidden", "honest", "little", "narrow", "patient", "quiet", "rusty", "silver",
    "stubborn", "wooden",
];
const DEEDS: &[(&str, &str)] = &[
    ("carry", "carried"),
    ("clean", "cleaned"),
    ("draw", "drew"),
    ("find", "found"),
    ("follow", "followed"),
    ("guard", "guarded"),
    ("lend", "lent"),
    ("measure", "measured"),
    ("mend", "mended"),
    ("move", "moved"),
    ("open", "opened"),
    ("paint", "painted"),
    ("repair", "repaired"),
    ("sell", "sold"),
    ("study", "studied"),
    ("watch", "watched"),
];
const TIMES: &[&str] = &[
    "After the rain",
    "At dawn",
    "Before supper",
    "Every autumn",
    "In the evening",
    "Late that night",
    "Long ago",
    "On the third day",
    "That winter",
    "When the wind turned",
];
const REASONS: &[&str] = &[
    "because nobody else would",
    "because the road was closed",
    "for the sake of peace",
    "in spite of the snow",
    "so that the children could sleep",
    "to please an old friend",
    "until the light was gone",
    "without a word",
];

struct Writer {
    rng: ChaCha8Rng,
    text: String,
}

impl Writer {
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        // Squaring a uniform draw favours the front: words differ in frequency, as they do in language.
        let (a, b) = (
            below(&mut self.rng, from.len()),
            below(&mut self.rng, from.len()),
        );
        from[a.min(b)]
    }

    fn chance(&mut self, percent: usize) -> bool {
        below(&mut self.rng, 100) < percent
    }

    fn thing(&mut self) -> String {
        let noun = self.pick(THINGS);
        match below(&mut self.rng, 3) {
            0 => format!("the {noun}"),
            1 => format!("the {} {noun}", self.pick(ADJECTIVES)),
            _ => with_article(self.pick(ADJECTIVES), noun),
        }
    }

    fn person(&mut self, hero: &str) -> String {
        match below(&mut self.rng, 4) {
            0 | 1 => hero.to_owned(),
            2 => format!("the {}", self.pick(PEOPLE)),
            _ => format!("the {} {}", self.pick(ADJECTIVES), self.pick(PEOPLE)),
        }
    }

    fn clause(&mut self, hero: &str) -> String {
        let who = self.person(hero);
        let (infinitive, past) = self.pick(DEEDS);
        let what = self.thing();
        match below(&mut self.rng, 4) {
            0 => format!("{who} {past} {what}"),
            1 => format!("{who} {past} {what} {}", self.pick(PLACES)),
            2 => format!("{who} {past} {what} {}", self.pick(REASONS)),
            _ => format!("{who} promised to {infinitive} {what}"),
        }
    }

    fn sentence(&mut self, hero: &str) -> String {
        let clause = self.clause(hero);
        match below(&mut self.rng, 6) {
            0 | 1 => format!("{clause}."),
            2 => format!("{}, {clause}.", self.pick(TIMES)),
            3 => format!("{clause}, and {}.", self.clause(hero)),
            4 => format!("{clause}, but {}.", self.clause(hero)),
            _ => {
                let (infinitive, _) = self.pick(DEEDS);
                let (who, what) = (self.pick(NAMES), self.thing());
                format!("\"Who will {infinitive} {what}?\" asked {who}.")
            }
        }
    }

    fn paragraph(&mut self) {
        let hero = self.pick(NAMES);
        let sentences = 3 + below(&mut self.rng, 6);
        for number in 0..sentences {
            let sentence = self.sentence(hero);
            if number > 0 {
                self.text.push(' ');
            }
            self.text.push_str(&capitalised(&sentence));
        }
        let end = if self.chance(20) { "\n\n" } else { "\n" };
        self.text.push_str(end);
    }
}

fn with_article(adjective: &str, noun: &str) -> String {
    let article = if adjective.starts_with(['a', 'e', 'i', 'o', 'u']) || adjective == "honest" {
        "an"
    } else {
        "a"
    };
    format!("{article} {adjective} {noun}")
}

fn capitalised(sentence: &str) -> String {
    let mut letters = sentence.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

/// The built-in text: about 600 kB of ASCII, always the same.
#[must_use]
pub fn builtin_text() -> String {
    let mut writer = Writer {
        rng: ChaCha8Rng::seed_from_u64(SEED),
        text: String::with_capacity(BYTES + 2000),
    };
    while writer.text.len() < BYTES {
        writer.paragraph();
    }
    writer.text
}
