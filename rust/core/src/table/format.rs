//! The file of a table: profile `vqrs-table/1` of safetensors, which any reader of that format opens.
//!
//! ```text
//! u64 header length | JSON, padded with spaces to a multiple of 4096 | codes | decoder tensors | extra tensors
//!                                                                     | vqrs.blocks | vqrs.footer
//! ```
//!
//! Every tensor starts on 64 bytes, with `__pad.N` tensors of zeros in the gaps. `vqrs.blocks` holds the XXH3-64 of
//! each 64 KiB block of the file up to itself, seeded with the block's number; `vqrs.footer` a magic number, the
//! XXH3-128 of the header and of `vqrs.blocks`, and the file's length. So a reader that trusts the header and the
//! decoder has hashed little more than these, whatever the size of the codes.

mod header;
mod json;
mod writer;

pub use crate::table::map::Mode;
pub use writer::Writer;

use crate::error::{Error, Result};
use crate::kernels;
use crate::pool::Context;
use crate::table::map::{Mapping, Source};
use crate::tensor::{Buffer, Bytes, Dtype, Tensor};
use header::Entry;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;
use twox_hash::{XxHash3_128, XxHash3_64};

/// Bytes that share a checksum.
pub const BLOCK: usize = 64 * 1024;
/// The version of the file that this library writes and reads.
pub const PROFILE: &str = "vqrs-table/1";
/// Features that a file may require of its reader.
pub const KNOWN_FEATURES: &[&str] = &[];

const MAGIC: [u8; 8] = *b"\x89vqrs\r\n\x1a";
/// Magic number, hash of header and blocks, length of the file.
const FOOTER: usize = 8 + 16 + 8;
/// Bytes whose pages are asked for at once.
const STRIDE: usize = 16 << 20;
/// Blocks that one step of a whole verification checks: 1 MiB, so that interrupts are answered soon.
const STEP: usize = 16;

/// Name, type and shape of a tensor whose values are not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Type of its values.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// The spec of an existing tensor.
    pub fn of(tensor: &Tensor) -> Self {
        TensorSpec { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() }
    }
}

/// What is known of a table before its first code is written.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// What the table says of itself. `profile`, `rows` and `row_bytes` are set by the writer, and `requires` (the
    /// features that a reader must know) is an empty list where it is missing.
    pub description: Map<String, Value>,
    /// The user's own strings; the keys `format` and `vqrs` are taken.
    pub metadata: BTreeMap<String, String>,
    /// Bytes of the codes of a row.
    pub row_bytes: usize,
    /// The decoder's tensors, in order.
    pub tensors: Vec<TensorSpec>,
    /// Tensors that lookups do not need, named `vqrs.*`, for example row names.
    pub extra: Vec<TensorSpec>,
}

/// Exact bytes of the file that a [`Writer`] makes for `rows` rows.
pub fn file_size(layout: &Layout, rows: u64) -> Result<u64> {
    layout.check()?;
    let entries = header::entries(layout, header::room(layout)?, rows)?;
    Ok(entries.last().map_or(0, |entry| entry.end))
}

fn parameter(name: &str, value: impl ToString, expected: impl Into<String>) -> Error {
    Error::parameter(name, value, expected)
}

fn block_hash(number: u64, bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(number, bytes)
}

fn footer(header: &[u8], blocks: &[u8], length: u64) -> [u8; FOOTER] {
    let mut hash = XxHash3_128::new();
    hash.write(header);
    hash.write(blocks);
    let mut all = [0; FOOTER];
    all[..8].copy_from_slice(&MAGIC);
    all[8..24].copy_from_slice(&hash.finish_128().to_le_bytes());
    all[24..].copy_from_slice(&length.to_le_bytes());
    all
}

/// What is checked when, beside the header, the lengths and the decoder's tensors, which always are on opening.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Nothing more.
    #[default]
    Header,
    /// Blocks of codes when [`File::touch`] first meets them.
    Lazy,
    /// Everything, on opening.
    Full,
}

/// An open table file, checked.
pub struct File {
    path: PathBuf,
    source: Arc<Mapping>,
    verify: Verify,
    header: header::Header,
    tensors: Vec<Tensor>,
    rows: usize,
    row_bytes: usize,
    /// Bytes of the file that have checksums, and those of the checksums.
    body: usize,
    blocks: Range<usize>,
    /// One bit a block: found to be as written.
    sound: Vec<AtomicU64>,
}

impl File {
    /// Opens a table. The header, its agreement with the file's length, the footer and the blocks that hold decoder
    /// tensors are checked, and with [`Verify::Full`] everything.
    pub fn open(path: &Path, verify: Verify, mode: Mode) -> Result<File> {
        File::open_with(path, verify, mode, &Context::default())
    }

    /// [`File::open`] in a context, which can be cancelled.
    pub fn open_with(path: &Path, verify: Verify, mode: Mode, ctx: &Context) -> Result<File> {
        let mut source = Source::open(path)?;
        let length = source.len();
        let (mapping, header) = match source.map(mode)? {
            Some(mapping) => {
                let header = header::parse(path, mapping.bytes(), length as u64)?;
                (mapping, header)
            }
            // Both ends first: a file that is no table is not read whole, however long it is.
            None => {
                let start = source.part(0, header::START)?;
                let start = source.part(0, header::size(&start))?;
                let header = header::parse(path, &start, length as u64)?;
                check_end(path, &source.part(length - FOOTER, FOOTER)?, length as u64)?;
                source.check_memory()?;
                let blocks = header.blocks();
                check_hash(
                    path,
                    &start,
                    &source.part(blocks.start, blocks.len())?,
                    &source.part(length - FOOTER, FOOTER)?,
                )?;
                (source.read(&start, ctx)?, header)
            }
        };
        check_end(path, &mapping.bytes()[length - FOOTER..], length as u64)?;
        let mut file = File::new(path, mapping, header, verify)?;
        // A forger may make the list of checksums as long as he likes: one of them tells first.
        if file.blocks.len() > STRIDE {
            file.check_block(0)?;
        }
        file.check_footer()?;
        let decoder = decoder_range(&file.header.entries);
        for start in decoder.clone().step_by(STRIDE) {
            let part = start..decoder.end.min(start + STRIDE);
            file.source.prefetch(part.clone());
            file.check_range(&part)?;
        }
        file.tensors = file.decoder_entries().map(|entry| file.tensor(entry)).collect::<Result<_>>()?;
        if verify == Verify::Full {
            file.verify(ctx)?;
        }
        Ok(file)
    }

    fn new(path: &Path, mapping: Mapping, header: header::Header, verify: Verify) -> Result<File> {
        let blocks = header.blocks();
        let shape = &header.entries[0].shape;
        Ok(File {
            path: path.into(),
            source: Arc::new(mapping),
            verify,
            tensors: Vec::new(),
            rows: shape[0] as usize,
            row_bytes: shape[1] as usize,
            body: blocks.start,
            sound: (0..blocks.len().div_ceil(8 * 64)).map(|_| AtomicU64::new(0)).collect(),
            blocks,
            header,
        })
    }

    /// What the table says of itself.
    pub fn description(&self) -> &Map<String, Value> {
        &self.header.description
    }

    /// The user's own strings.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Both, which may be large, for whoever keeps them himself.
    pub(super) fn take_texts(&mut self) -> (Map<String, Value>, BTreeMap<String, String>) {
        (std::mem::take(&mut self.header.description), std::mem::take(&mut self.header.metadata))
    }

    /// Rows of codes.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of the codes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Bytes of the file.
    #[allow(clippy::len_without_is_empty)] // An open table is never empty.
    pub fn len(&self) -> u64 {
        self.source.bytes().len() as u64
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The codes, row after row.
    pub fn codes(&self) -> Buffer {
        Buffer::share(self.source.clone(), self.header.entries[0].range())
    }

    /// The decoder's tensors, in order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// An extra tensor, checked on the way.
    pub fn extra(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(entry) = self.header.entries.iter().find(|e| e.is_extra() && e.name == name) else {
            return Ok(None);
        };
        self.check_range(&entry.range())?;
        self.tensor(entry).map(Some)
    }

    /// Checks everything: header, footer, every block, every pad.
    pub fn verify(&self, ctx: &Context) -> Result<()> {
        self.check_footer()?;
        let count = self.body.div_ceil(BLOCK);
        ctx.stage("verify", count as u64);
        ctx.map(count.div_ceil(STEP), |step| {
            let blocks = step * STEP..count.min((step + 1) * STEP);
            ctx.advance(blocks.len() as u64);
            blocks.into_iter().try_for_each(|number| self.check_block(number))
        })?;
        match self.damaged() {
            true => Err(self.corrupt("was cut while it was open")),
            false => Ok(()),
        }
    }

    /// With [`Verify::Lazy`], checks the blocks that hold these rows, each once. Else returns at once.
    pub fn touch(&self, rows: Range<usize>) -> Result<()> {
        if !self.is_lazy() {
            return Ok(());
        }
        self.check_rows(rows)
    }

    /// Checks the blocks that hold these rows, each once.
    pub fn check_rows(&self, rows: Range<usize>) -> Result<()> {
        let start = self.header.entries[0].range().start;
        self.check_range(&(start + rows.start * self.row_bytes..start + rows.end * self.row_bytes))
    }

    /// True if [`File::touch`] has something to do.
    pub fn is_lazy(&self) -> bool {
        self.verify == Verify::Lazy
    }

    /// True if the file is mapped, false if it was read into memory.
    pub fn is_mapped(&self) -> bool {
        self.source.is_mapped()
    }

    /// True once a page of the mapped file was found missing: zeros were read in its place.
    pub fn damaged(&self) -> bool {
        self.source.damaged()
    }

    fn decoder_entries(&self) -> impl Iterator<Item = &Entry> {
        self.header.entries.iter().filter(|entry| entry.is_decoder())
    }

    fn tensor(&self, entry: &Entry) -> Result<Tensor> {
        let shape = entry.shape.iter().map(|n| *n as usize).collect();
        Tensor::new(entry.name.as_str(), entry.dtype, shape, Buffer::share(self.source.clone(), entry.range()))
    }

    fn corrupt(&self, why: impl Into<String>) -> Error {
        Error::corrupt(&self.path, why)
    }

    /// The footer, and the pad before it, which no checksum covers.
    fn check_footer(&self) -> Result<()> {
        let bytes = self.source.bytes();
        let (rest, found) = bytes.split_at(bytes.len() - FOOTER);
        check_end(&self.path, found, bytes.len() as u64)?;
        check_hash(&self.path, &bytes[..self.header.size], &bytes[self.blocks.clone()], found)?;
        match rest[self.blocks.end..].iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(self.corrupt("the pad before the footer is not zero")),
        }
    }

    /// Checks the blocks of a range of bytes that were not found sound before.
    fn check_range(&self, range: &Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        for number in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            if self.sound[number / 64].load(Relaxed) >> (number % 64) & 1 == 0 {
                self.check_block(number)?;
            }
        }
        Ok(())
    }

    /// Compares a block with its checksum and, while it is in the cache, looks at its values.
    fn check_block(&self, number: usize) -> Result<()> {
        let range = number * BLOCK..self.body.min((number + 1) * BLOCK);
        let stored = self.blocks.start + 8 * number;
        let bytes = self.source.bytes();
        if block_hash(number as u64, &bytes[range.clone()]).to_le_bytes() != bytes[stored..stored + 8] {
            let cause = if self.damaged() { ": the file was cut while it was open" } else { "" };
            let at = format!("bytes {} to {} do not match their checksum", range.start, range.end);
            return Err(self.corrupt(format!("{at} (block {number}){cause}")));
        }
        self.check_values(&range)?;
        self.sound[number / 64].fetch_or(1 << (number % 64), Relaxed);
        Ok(())
    }

    /// Floats are finite and pads zero, as far as they lie in `range`, which starts and ends between values.
    fn check_values(&self, range: &Range<usize>) -> Result<()> {
        let entries = &self.header.entries;
        let first = entries.partition_point(|entry| entry.range().end <= range.start);
        for entry in entries[first..].iter().take_while(|entry| entry.range().start < range.end) {
            let part = entry.range().start.max(range.start)..entry.range().end.min(range.end);
            let bytes = &self.source.bytes()[part.clone()];
            if entry.is_pad() && bytes.iter().any(|byte| *byte != 0) {
                return Err(self.corrupt(format!("the pad {} at byte {} is not zero", entry.name, part.start)));
            }
            if !finite(entry.dtype, bytes) {
                let part = format!("between bytes {} and {}", part.start, part.end);
                return Err(self.corrupt(format!("{} holds NaN or infinity {part}", entry.name)));
            }
        }
        Ok(())
    }
}

/// What the footer says by itself: that it is one, and the file's length.
fn check_end(path: &Path, footer: &[u8], length: u64) -> Result<()> {
    if !footer.starts_with(&MAGIC) || footer.len() != FOOTER {
        let found = &footer[..footer.len().min(8)];
        return Err(Error::corrupt(path, format!("the footer starts with {found:02x?}, expected {MAGIC:02x?}")));
    }
    if footer[24..] != length.to_le_bytes() {
        let stated = footer[24..].iter().rev().fold(0_u64, |all, byte| all << 8 | u64::from(*byte));
        return Err(Error::corrupt(path, format!("has {length} bytes, but its footer says {stated}")));
    }
    Ok(())
}

/// That the footer's checksum is that of the header and of the list of checksums.
fn check_hash(path: &Path, header: &[u8], blocks: &[u8], found: &[u8]) -> Result<()> {
    if found.get(8..24) != Some(&footer(header, blocks, 0)[8..24]) {
        let why = "the header or the list of checksums does not match the footer's checksum";
        return Err(Error::corrupt(path, why));
    }
    Ok(())
}

/// The bytes from the first decoder tensor to the last.
fn decoder_range(entries: &[Entry]) -> Range<usize> {
    let mut all = entries.iter().filter(|entry| entry.is_decoder()).map(Entry::range);
    let first = all.next().unwrap_or(0..0);
    first.start..all.next_back().map_or(first.end, |last| last.end)
}

/// True if no float of these bytes, a multiple of four of them but at the end of a tensor, has a full exponent.
fn finite(dtype: Dtype, bytes: &[u8]) -> bool {
    let (mask, one, full) = match dtype {
        Dtype::U8 | Dtype::I8 | Dtype::U64 => return true,
        Dtype::F16 => (0x7c00_7c00, 0x0400_0400, 0x8000_8000),
        Dtype::Bf16 => (0x7f80_7f80, 0x0080_0080, 0x8000_8000),
        Dtype::F32 => (0x7f80_0000, 0x0080_0000, 0x8000_0000),
    };
    let (words, rest) = bytes.split_at(bytes.len() / 4 * 4);
    let last = rest.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    let all = (kernels::best().carries)(bytemuck::cast_slice(words), mask, one) | ((last & mask) + one);
    all & full == 0
}
