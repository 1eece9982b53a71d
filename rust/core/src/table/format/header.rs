//! The header: where each tensor stands, as JSON, made by [`header_bytes`] and checked by [`parse`].
//!
//! One function, [`place`], decides where tensors, pads and checksums stand. The writer follows it; the reader takes
//! names, types and shapes from the header, places them again and refuses any file that differs.

use super::json::{brief, Raw, Strict, DESCRIPTION, HEADER};
use super::{parameter, Layout, TensorSpec, BLOCK, FOOTER, KNOWN_FEATURES, PROFILE};
use crate::error::{Error, Result};
use crate::tensor::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::Path;

/// Largest JSON text of a header, in bytes, and of the description in it.
const MAX_HEADER: u64 = 16 << 20;
const MAX_DESCRIPTION: usize = 4 << 20;
/// Most bytes of a file: more than any disk has, and few enough for the list of its checksums to be read.
const MAX_FILE: u64 = 1 << 44;
/// Most tensors in a file, pads included.
pub(super) const MAX_TENSORS: usize = 4096;
/// Most bytes of a tensor's name.
const MAX_NAME: usize = 512;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;
/// Most bytes of a row. Bounds what a table without rows may claim.
const MAX_ROW_BYTES: u64 = 1 << 31;
/// The codes start on a multiple of this.
const PAGE: u64 = 4096;
/// Every tensor starts on a multiple of this.
const ALIGN: u64 = 64;

const CODES: &str = "codes";
const BLOCKS: &str = "vqrs.blocks";
const FOOTER_NAME: &str = "vqrs.footer";
pub(super) const METADATA: &str = "__metadata__";
const PAD: &str = "__pad.";
/// Extra tensors start with this; decoder tensors do not.
const EXTRA: &str = "vqrs.";

/// A check that knows what is wrong, but not in which file.
type Checked<T> = std::result::Result<T, String>;

/// What a header says of a tensor. Offsets count from the end of the header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// A tensor and its place, counted in bytes of the file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Entry {
    pub(super) fn is_pad(&self) -> bool {
        self.name.starts_with(PAD)
    }

    pub(super) fn is_blocks(&self) -> bool {
        self.name == BLOCKS
    }

    pub(super) fn is_extra(&self) -> bool {
        self.name.starts_with(EXTRA) && !self.is_blocks() && self.name != FOOTER_NAME
    }

    pub(super) fn is_decoder(&self) -> bool {
        self.name != CODES && !self.is_pad() && !self.name.starts_with(EXTRA)
    }

    /// Its bytes; a checked header lies within the file, whose bytes can be addressed.
    pub(super) fn range(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    fn info(&self, header: u64) -> Info {
        let data_offsets = [self.start - header, self.end - header];
        Info { dtype: self.dtype.name().into(), shape: self.shape.clone(), data_offsets }
    }
}

/// Name, type and shape of a tensor that is not a pad or a checksum.
struct Spec<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: Vec<u64>,
}

/// Entries in file order: `codes`, the given tensors, `vqrs.blocks`, `vqrs.footer`, with pads between them.
struct Places {
    entries: Vec<Entry>,
    at: u64,
    pads: usize,
}

impl Places {
    fn put(&mut self, name: &str, dtype: Dtype, shape: Vec<u64>) -> Option<()> {
        let size = shape.iter().try_fold(dtype.size() as u64, |product, n| product.checked_mul(*n))?;
        let (start, end) = (self.at, self.at.checked_add(size)?);
        self.entries.push(Entry { name: name.into(), dtype, shape, start, end });
        self.at = end;
        Some(())
    }

    fn align(&mut self) -> Option<()> {
        let missing = self.at.checked_next_multiple_of(ALIGN)? - self.at;
        if missing == 0 {
            return Some(());
        }
        self.pads += 1;
        self.put(&format!("{PAD}{}", self.pads - 1), Dtype::U8, vec![missing])
    }
}

/// Where everything stands behind a header of `header` bytes. `None`: a size does not fit 64 bits.
fn place<'a>(header: u64, specs: impl IntoIterator<Item = Spec<'a>>) -> Option<Vec<Entry>> {
    let mut places = Places { entries: Vec::new(), at: header, pads: 0 };
    for spec in specs {
        places.align()?;
        places.put(spec.name, spec.dtype, spec.shape)?;
    }
    places.align()?;
    places.put(BLOCKS, Dtype::U64, vec![places.at.div_ceil(BLOCK as u64)])?;
    places.align()?;
    places.put(FOOTER_NAME, Dtype::U8, vec![FOOTER as u64])?;
    Some(places.entries)
}

/// The JSON text of a header.
fn render(metadata: &BTreeMap<String, String>, tensors: impl Iterator<Item = (String, Info)>) -> Result<String> {
    let mut text = format!("{{{METADATA:?}:{}", json(metadata)?);
    for (name, info) in tensors {
        text += &format!(",{}:{}", json(&name)?, json(&info)?);
    }
    text.push('}');
    Ok(text)
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| parameter("metadata", e, "text"))
}

// ---------------------------------------------------------------- writing

/// The entries of a file of `rows` rows whose header takes `header` bytes.
pub(super) fn entries(layout: &Layout, header: u64, rows: u64) -> Result<Vec<Entry>> {
    let codes = Spec { name: CODES, dtype: Dtype::U8, shape: vec![rows, layout.row_bytes as u64] };
    let rest = layout.all().map(|t| Spec { name: &t.name, dtype: t.dtype, shape: wide(&t.shape) });
    let placed = place(header, std::iter::once(codes).chain(rest));
    placed.filter(|all| all.last().is_none_or(|last| last.end <= MAX_FILE)).ok_or_else(|| Error::OutOfRange {
        what: format!("a table of {rows} rows of {} bytes", layout.row_bytes),
        why: format!("its file would be longer than {MAX_FILE} bytes"),
    })
}

/// Bytes to reserve for the header, its length included: enough whatever numbers will stand in it, so that they
/// depend on the layout alone.
pub(super) fn room(layout: &Layout) -> Result<u64> {
    let widest = |name: &str, dtype: Dtype, shape: Vec<u64>| {
        (name.to_string(), Info { dtype: dtype.name().into(), shape, data_offsets: [u64::MAX; 2] })
    };
    let mut all = vec![widest(CODES, Dtype::U8, vec![u64::MAX, layout.row_bytes as u64])];
    all.extend(layout.all().map(|t| widest(&t.name, t.dtype, wide(&t.shape))));
    all.push(widest(BLOCKS, Dtype::U64, vec![u64::MAX]));
    all.push(widest(FOOTER_NAME, Dtype::U8, vec![FOOTER as u64]));
    let pads = (1..all.len()).map(|n| widest(&format!("{PAD}{n}"), Dtype::U8, vec![ALIGN]));
    let all: Vec<_> = pads.chain(all.clone()).collect();
    let tensors = all.len();
    let widest = json(&widen_all(&description(layout, u64::MAX)))?;
    let text = render(&metadata(layout, &widest), all.into_iter())?;
    let room = (8 + text.len() as u64).next_multiple_of(PAGE);
    for (what, checked) in [("description", check_size(&widest)), ("metadata", HEADER.check(&text))] {
        checked.map_err(|why| Error::OutOfRange { what: format!("the table's {what}"), why })?;
    }
    if tensors > MAX_TENSORS || room - 8 > MAX_HEADER {
        let why = format!("a header of {room} bytes for up to {tensors} tensors, pads included, is above the limits of {MAX_HEADER} bytes and {MAX_TENSORS} tensors");
        return Err(Error::OutOfRange { what: "the table's description, metadata and tensor list".into(), why });
    }
    Ok(room)
}

/// The header, padded with spaces to `room` bytes.
pub(super) fn header_bytes(layout: &Layout, room: u64, entries: &[Entry], rows: u64) -> Result<Vec<u8>> {
    let metadata = metadata(layout, &json(&description(layout, rows))?);
    let text = render(&metadata, entries.iter().map(|e| (e.name.clone(), e.info(room))))?;
    if 8 + text.len() as u64 > room {
        let found = format!("{} bytes of header", text.len());
        return Err(Error::shape("the final description", found, format!("at most the {} reserved", room - 8)));
    }
    let mut bytes = (room - 8).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes.resize(room as usize, b' ');
    Ok(bytes)
}

/// The description with what every table states.
fn description(layout: &Layout, rows: u64) -> Map<String, Value> {
    let mut all = layout.description.clone();
    all.insert("profile".into(), PROFILE.into());
    all.entry("requires").or_insert_with(|| Value::Array(Vec::new()));
    all.insert("rows".into(), rows.into());
    all.insert("row_bytes".into(), layout.row_bytes.into());
    all
}

fn metadata(layout: &Layout, description: &str) -> BTreeMap<String, String> {
    let mut all = layout.metadata.clone();
    all.insert("format".into(), "pt".into());
    all.insert("vqrs".into(), description.into());
    all
}

/// Refuses the text of a description that holds more than one may.
fn check_size(description: &str) -> Checked<()> {
    match description.len() {
        found if found > MAX_DESCRIPTION => Err(format!("{found} bytes, expected at most {MAX_DESCRIPTION}")),
        _ => DESCRIPTION.check(description),
    }
}

fn widen_all(map: &Map<String, Value>) -> Map<String, Value> {
    map.iter().map(|(key, value)| (key.clone(), widen(value))).collect()
}

/// `value` with every number, and null in place of one, as long as a number can be: 24 characters.
fn widen(value: &Value) -> Value {
    match value {
        Value::Number(_) | Value::Null => Value::from(-f64::MIN_POSITIVE),
        Value::Array(list) => Value::Array(list.iter().map(widen).collect()),
        Value::Object(map) => Value::Object(widen_all(map)),
        Value::Bool(_) | Value::String(_) => value.clone(),
    }
}

impl Layout {
    fn all(&self) -> impl Iterator<Item = &TensorSpec> {
        self.tensors.iter().chain(&self.extra)
    }

    /// Refuses what a file cannot hold, or what the reader would refuse.
    pub(super) fn check(&self) -> Result<()> {
        if self.row_bytes as u64 > MAX_ROW_BYTES {
            return Err(parameter("row_bytes", self.row_bytes, format!("a row takes up to {MAX_ROW_BYTES} bytes")));
        }
        if let Some(key) = ["format", "vqrs"].into_iter().find(|key| self.metadata.contains_key(*key)) {
            return Err(parameter("metadata", format!("{{{key:?}: ...}}"), "the keys format and vqrs are reserved"));
        }
        let mut seen = HashSet::new();
        for tensor in self.all() {
            let refuse = |why: String| parameter("tensor", &tensor.name, why);
            check_name(&tensor.name).map_err(|why| refuse(why.into()))?;
            check_shape(&wide(&tensor.shape)).map_err(refuse)?;
            if !seen.insert(&tensor.name) {
                return Err(refuse("each tensor has a name of its own".into()));
            }
        }
        let misplaced = self.tensors.iter().find(|t| t.name.starts_with(EXTRA));
        match misplaced.or_else(|| self.extra.iter().find(|t| !t.name.starts_with(EXTRA))) {
            Some(t) => Err(parameter("tensor", &t.name, format!("extra tensors, and only they, start with {EXTRA}"))),
            None => Ok(()),
        }
    }
}

fn check_name(name: &str) -> std::result::Result<(), &'static str> {
    match name {
        "" => Err("a tensor has a name"),
        CODES | BLOCKS | FOOTER_NAME => Err("this name is reserved"),
        _ if name.starts_with("__") => Err("names that start with two underscores are reserved"),
        _ if name.len() > MAX_NAME => Err("a name has at most 512 bytes"),
        _ => Ok(()),
    }
}

fn wide(shape: &[usize]) -> Vec<u64> {
    shape.iter().map(|n| *n as u64).collect()
}

/// An array without values is `[0]`: it could else claim any number of rows without a byte behind them.
fn check_shape(shape: &[u64]) -> Checked<()> {
    if shape.len() > MAX_DIMENSIONS || (shape.len() > 1 && shape.contains(&0)) {
        return Err(format!("the shape {shape:?} has more than {MAX_DIMENSIONS} dimensions, or no values and not [0]"));
    }
    Ok(())
}

// ---------------------------------------------------------------- reading

/// A checked header.
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) description: Map<String, Value>,
    pub(super) entries: Vec<Entry>,
    pub(super) size: usize,
}

impl Header {
    /// Bytes of the list of checksums.
    pub(super) fn blocks(&self) -> Range<usize> {
        self.entries.iter().find(|entry| entry.is_blocks()).map_or(0..0, Entry::range)
    }
}

/// Bytes from the start of a file that tell its header's size, and whether it can be one.
pub(super) const START: usize = 9;

/// Bytes from the start of a file up to the end of its header, as its first nine say; so many where that cannot be.
pub(super) fn size(start: &[u8]) -> usize {
    match start.split_first_chunk() {
        Some((length, [b'{'])) => START.max(8 + u64::from_le_bytes(*length).min(MAX_HEADER) as usize),
        _ => START,
    }
}

/// Reads the header of a file of `length` bytes, of which those up to the end of the header are here, and checks that
/// it describes exactly so many.
pub(super) fn parse(path: &Path, bytes: &[u8], length: u64) -> Result<Header> {
    let refuse = |why: String| Error::corrupt(path, why);
    let text = text(bytes).map_err(|why| refuse(foreign(bytes).map_or(why, not_a_table)))?;
    let padded = text.bytes().rposition(|byte| byte != b' ').map_or(0, |last| last + 1);
    let json = text.get(..padded).unwrap_or(text);
    let raw = HEADER.check(json).and_then(|()| serde_json::from_str::<Raw>(json).map_err(|e| e.to_string()));
    let raw = raw.map_err(|why| {
        refuse(foreign(bytes).map_or_else(|| format!("the header is not what a table has: {why}"), not_a_table))
    })?;
    let Some(mut metadata) = raw.metadata.filter(|all| all.contains_key("vqrs")) else {
        return Err(refuse(not_a_table("a safetensors file without a vqrs description")));
    };
    let own = metadata.remove("vqrs").unwrap_or_default();
    let own = check_size(&own).and_then(|()| serde_json::from_str(&own).map_err(|e| e.to_string()));
    let Strict(own) = own.map_err(|why| refuse(format!("the vqrs description: {why}")))?;
    let Value::Object(description) = own else {
        return Err(refuse("the vqrs description is not a JSON object".into()));
    };
    check_version(path, &description)?;
    let size = 8 + text.len();
    check_text(json, size as u64).and_then(|()| check_format(&mut metadata)).map_err(refuse)?;
    let entries = check_tensors(&raw.tensors, size as u64, length).map_err(refuse)?;
    check_description(&description, &entries[0]).map_err(refuse)?;
    Ok(Header { metadata, description, entries, size })
}

/// The JSON text, padding included.
fn text(bytes: &[u8]) -> Checked<&str> {
    let short = || format!("has {} bytes, fewer than the 8 of a header's length", bytes.len());
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        let limit = format!("more than the {MAX_HEADER} that are allowed: it is damaged or not a vqrs table");
        return Err(format!("states a header of {length} bytes, {limit}"));
    }
    if rest.first().is_some_and(|first| *first != b'{') {
        return Err(format!(
            "the header is not what a table has: it starts with the byte {:#04x}, expected '{{'",
            rest[0]
        ));
    }
    let Some(text) = rest.get(..length as usize) else {
        return Err(format!("states a header of {length} bytes, but only {} follow: it was cut", rest.len()));
    };
    std::str::from_utf8(text).map_err(|e| format!("the header is not UTF-8 from byte {} on", 8 + e.valid_up_to()))
}

/// What a file is that is surely something else.
fn foreign(bytes: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 6] = [
        (b"\x93NUMPY", "a NumPy array (.npy)"),
        (b"PK\x03\x04", "a zip archive (.npz or .pt)"),
        (b"\x80\x02", "a pickle"),
        (b"\x89HDF", "an HDF5 file"),
        (b"PAR1", "a Parquet file"),
        (b"GGUF", "a GGUF file"),
    ];
    known.into_iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, what)| what)
}

fn not_a_table(what: &str) -> String {
    format!("is {what}, not a vqrs table: make a table of it with `vqrs compress`")
}

fn check_version(path: &Path, description: &Map<String, Value>) -> Result<()> {
    let needs = |why: String| Err(Error::Version { path: path.into(), why });
    let profile = description.get("profile").and_then(Value::as_str);
    let Some(profile) = profile else {
        return Err(Error::corrupt(path, format!("the vqrs description names no profile, expected {PROFILE:?}")));
    };
    if profile != PROFILE {
        return needs(format!("has the profile {}, but this library reads {PROFILE:?}: update vqrs", brief(profile)));
    }
    let listed = description.get("requires").and_then(Value::as_array);
    let features: Option<Vec<&str>> = listed.and_then(|all| all.iter().map(Value::as_str).collect());
    let Some(features) = features else {
        return Err(Error::corrupt(path, "the vqrs description has no list of required features"));
    };
    let mut unknown: Vec<&str> = features.into_iter().filter(|name| !KNOWN_FEATURES.contains(name)).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    if unknown.len() > 20 {
        unknown.truncate(20);
        unknown.push("...");
    }
    let names: Vec<String> = unknown.into_iter().map(|name| name.chars().take(100).collect()).collect();
    needs(format!("requires features that this library does not know: {}: update vqrs", names.join(", ")))
}

fn check_text(json: &str, size: u64) -> Checked<()> {
    if !size.is_multiple_of(PAGE) {
        return Err(format!("the header takes {size} bytes, expected a multiple of {PAGE}"));
    }
    if !json.ends_with('}') {
        return Err("the header is padded with something else than spaces behind it".into());
    }
    Ok(())
}

fn check_format(metadata: &mut BTreeMap<String, String>) -> Checked<()> {
    match metadata.remove("format").as_deref() {
        Some("pt") => Ok(()),
        found => Err(format!("the metadata has format={}, expected \"pt\"", brief(found.unwrap_or_default()))),
    }
}

/// Places the tensors of the header again and compares.
fn check_tensors(found: &[(String, Info)], header: u64, length: u64) -> Checked<Vec<Entry>> {
    if let Some((name, info)) = found.iter().find(|(_, info)| info.shape.len() > MAX_DIMENSIONS) {
        return Err(format!("tensor {name:?} has {} dimensions, expected at most {MAX_DIMENSIONS}", info.shape.len()));
    }
    let own: Vec<_> = found.iter().filter(|(name, _)| !name.starts_with(PAD)).collect();
    let [(codes, _), middle @ .., (blocks, _), (footer, _)] = own.as_slice() else {
        return Err(format!("has {} tensors besides pads, expected at least codes and checksums", own.len()));
    };
    if (codes.as_str(), blocks.as_str(), footer.as_str()) != (CODES, BLOCKS, FOOTER_NAME) {
        let names = format!("starts with {codes:?} and ends with {blocks:?}, {footer:?}");
        return Err(format!("the tensor list {names}, expected {CODES:?} and {BLOCKS:?}, {FOOTER_NAME:?}"));
    }
    check_names(middle.iter().map(|(name, _)| name.as_str()))?;
    for (name, info) in middle {
        check_shape(&info.shape).map_err(|why| format!("tensor {name:?}: {why}"))?;
    }
    let specs = own[..own.len() - 2].iter().map(|(name, info)| spec(name, info)).collect::<Checked<Vec<_>>>()?;
    if specs[0].dtype != Dtype::U8 || specs[0].shape.len() != 2 || specs[0].shape[1] > MAX_ROW_BYTES {
        let (name, shape) = (specs[0].dtype.name(), &specs[0].shape);
        let expected = format!("U8 of shape [rows, row bytes] with up to {MAX_ROW_BYTES} row bytes");
        return Err(format!("codes are {name} of shape {shape:?}, expected {expected}"));
    }
    let expected = place(header, specs).ok_or("the sizes of the tensors overflow")?;
    compare(found, &expected, header)?;
    let end = expected.last().map_or(0, |entry| entry.end);
    match length {
        _ if end > MAX_FILE => Err(format!("describes {end} bytes, expected at most {MAX_FILE}")),
        _ if length < end => Err(format!("has {length} bytes, expected {end}: it was cut")),
        _ if length > end => Err(format!("has {length} bytes, expected {end}: something was appended")),
        _ => Ok(expected),
    }
}

/// Decoder tensors, then extra tensors, with names that they may have.
fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Checked<()> {
    let mut extra = false;
    for name in names {
        check_name(name).map_err(|why| format!("tensor {name:?}: {why}"))?;
        if extra && !name.starts_with(EXTRA) {
            return Err(format!("tensor {name:?} stands behind tensors that start with {EXTRA}, expected before them"));
        }
        extra = name.starts_with(EXTRA);
    }
    Ok(())
}

fn spec<'a>(name: &'a str, info: &Info) -> Checked<Spec<'a>> {
    match Dtype::from_name(&info.dtype) {
        Some(dtype) => Ok(Spec { name, dtype, shape: info.shape.clone() }),
        None => Err(format!("tensor {name:?} is of type {:?}, which tables do not use", info.dtype)),
    }
}

fn compare(found: &[(String, Info)], expected: &[Entry], header: u64) -> Checked<()> {
    for (at, entry) in expected.iter().enumerate() {
        let wanted = (entry.name.as_str(), entry.info(header));
        match found.get(at) {
            Some((name, info)) if (name.as_str(), info) == (wanted.0, &wanted.1) => {}
            found => return Err(format!("tensor {at} is {found:?}, expected {wanted:?}")),
        }
    }
    match found.get(expected.len()) {
        Some((name, _)) => Err(format!("tensor {name:?} does not belong here")),
        None => Ok(()),
    }
}

fn check_description(description: &Map<String, Value>, codes: &Entry) -> Checked<()> {
    for (key, expected) in ["rows", "row_bytes"].into_iter().zip(&codes.shape) {
        match description.get(key) {
            Some(found) if found.as_u64() == Some(*expected) => {}
            found => {
                let found: String =
                    found.map_or_else(|| "nothing".into(), |value| value.to_string().chars().take(100).collect());
                return Err(format!("the vqrs description says {found} for {key}, but the codes have {expected}"));
            }
        }
    }
    Ok(())
}
