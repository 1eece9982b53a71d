//! JSON without second meanings, of a size that is known before anything is made of it.

use super::header::{Info, MAX_TENSORS, METADATA};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};
use std::fmt;

/// What a text may hold. A value or a key takes a hundred bytes or two of memory, however short its text is.
pub(super) struct Limits {
    /// Most values, and as many keys.
    pub(super) values: usize,
    /// Most objects and lists inside each other.
    pub(super) depth: usize,
    /// Most bytes of a string, the user's own metadata aside.
    pub(super) string: usize,
}

/// The text of a header.
pub(super) const HEADER: Limits = Limits { values: 1 << 17, depth: 3, string: 1 << 12 };

/// The text of the description inside it.
pub(super) const DESCRIPTION: Limits = Limits { values: 1 << 17, depth: 64, string: 1 << 20 };

/// The start of a text that may be long, quoted.
pub(super) fn brief(text: &str) -> String {
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

impl Limits {
    /// Refuses a text that holds more than it may. Says nothing of whether it is JSON.
    pub(super) fn check(&self, text: &str) -> Result<(), String> {
        let (mut values, mut depth, mut free, mut at) = (1, 0usize, false, 0);
        let bytes = text.as_bytes();
        while let Some(byte) = bytes.get(at) {
            match byte {
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                b',' => values += 1,
                b'"' => {
                    let start = at + 1;
                    at = end_of_string(bytes, start);
                    let length = at - start;
                    if depth == 1 {
                        free = bytes[start..at] == *METADATA.as_bytes();
                    }
                    if length > self.string && !(free && depth == 2) {
                        return Err(format!(
                            "a string of {length} bytes at byte {start}, expected at most {}",
                            self.string
                        ));
                    }
                }
                _ => {}
            }
            if depth > self.depth || values > self.values {
                let most = format!("expected at most {} and {}", self.depth, self.values);
                return Err(format!("{depth} levels and {values} values up to byte {at}, {most}"));
            }
            at += 1;
        }
        Ok(())
    }
}

/// Where the string that starts at `at` ends.
fn end_of_string(bytes: &[u8], mut at: usize) -> usize {
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The header as it stands, keys in order, none twice.
pub(super) struct Raw {
    pub(super) metadata: Option<BTreeMap<String, String>>,
    pub(super) tensors: Vec<(String, Info)>,
}

/// Any JSON value whose objects have no key twice.
pub(super) struct Strict(pub(super) Value);

fn twice<E: serde::de::Error>(key: &str) -> E {
    E::custom(format!("the key {} stands here twice", brief(key)))
}

macro_rules! deserialize_map {
    ($type:ty, $expects:literal, |$map:ident| $body:block) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                struct Access;
                impl<'de> Visitor<'de> for Access {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                        f.write_str($expects)
                    }
                    fn visit_map<A: MapAccess<'de>>(self, mut $map: A) -> std::result::Result<$type, A::Error> $body
                }
                deserializer.deserialize_map(Access)
            }
        }
    };
}

/// [`Info`] as an object; what serde derives would also take a list.
struct InfoObject(Info);

deserialize_map!(InfoObject, "an object with dtype, shape and data_offsets", |map| {
    Info::deserialize(MapAccessDeserializer::new(&mut map)).map(InfoObject)
});

/// An object of strings.
struct Strings(BTreeMap<String, String>);

deserialize_map!(Strings, "an object of strings", |map| {
    let mut all = BTreeMap::new();
    while let Some(key) = map.next_key::<String>()? {
        if all.contains_key(&key) {
            return Err(twice(&key));
        }
        all.insert(key, map.next_value()?);
    }
    Ok(Strings(all))
});

deserialize_map!(Raw, "an object of tensors", |map| {
    let mut seen = HashSet::new();
    let mut raw = Raw { metadata: None, tensors: Vec::new() };
    while let Some(key) = map.next_key::<String>()? {
        if !seen.insert(key.clone()) {
            return Err(twice(&key));
        }
        if key == METADATA {
            raw.metadata = Some(map.next_value::<Strings>()?.0);
            continue;
        }
        if raw.tensors.len() == MAX_TENSORS {
            return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
        }
        raw.tensors.push((key, map.next_value::<InfoObject>()?.0));
    }
    Ok(raw)
});

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Strict;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Strict, E> {
        Ok(Strict(value.into()))
    }

    fn visit_unit<E>(self) -> std::result::Result<Strict, E> {
        Ok(Strict(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Strict, A::Error> {
        let mut all = Vec::new();
        while let Some(Strict(value)) = list.next_element()? {
            all.push(value);
        }
        Ok(Strict(Value::Array(all)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Strict, A::Error> {
        let mut all = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if all.contains_key(&key) {
                return Err(twice(&key));
            }
            let Strict(value) = map.next_value()?;
            all.insert(key, value);
        }
        Ok(Strict(Value::Object(all)))
    }
}
