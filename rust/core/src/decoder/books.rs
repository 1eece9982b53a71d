//! Form `books`: a row is a sum of codebook entries, each placed at some columns.
//!
//! k-means has one book over all columns, product codes have books side by side, residual and additive codes have
//! full-width books on top of each other.

use super::{take, Decoder, Form, Metric, Scorer};
use crate::bits;
use crate::error::{product, zeros, Error, Result};
use crate::kernels::{self, Bags, BooksView, Group, Output, Rows, Values};
use crate::tensor::{Buffer, Dtype, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Books of equal width, stored as one tensor of shape (books, 2^bits, width).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// Columns that an entry covers.
    pub width: usize,
    /// Entries in use; the rest up to 2^bits are zeros.
    pub entries: usize,
    /// First column of each book.
    pub starts: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
/// The description of a `Books` decoder.
pub struct BooksSpec {
    dim: usize,
    bits: u32,
    /// Power of two that entries are multiplied by: float16 books then keep their precision at any magnitude.
    scale: f32,
    dtype: CodebookDtype,
    groups: Vec<GroupSpec>,
}

/// Type of stored codebooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CodebookDtype {
    /// IEEE half precision: the default.
    Float16,
    /// The upper half of a float32.
    Bfloat16,
    /// Single precision.
    Float32,
    /// Integers from -127 to 127, with a scale for each book.
    Int8,
}

impl CodebookDtype {
    fn dtype(self) -> Dtype {
        match self {
            CodebookDtype::Float16 => Dtype::F16,
            CodebookDtype::Bfloat16 => Dtype::Bf16,
            CodebookDtype::Float32 => Dtype::F32,
            CodebookDtype::Int8 => Dtype::I8,
        }
    }
}

/// The largest magnitude of an integer entry.
const TOP: f32 = 127.0;

/// The scale of a book of integers: the least number of 16 significant bits that brings its largest entry to [`TOP`] or
/// below. Products with integers are then exact, so that a book read back and stored again keeps its scale.
fn book_scale(book: &[f32]) -> f32 {
    let largest = book.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = (largest / TOP).max(f32::MIN_POSITIVE);
    f32::from_bits((scale.to_bits() + 0xff) & !0xff)
}

/// A sum of codebook entries, each placed at some columns.
#[derive(Clone)]
pub struct Books {
    spec: BooksSpec,
    tensors: Vec<Tensor>,
    /// The scale of each book, where entries are integers.
    scales: Option<Tensor>,
    /// No column is covered twice and none is left out: entries are stored, not added.
    tiled: bool,
}

impl Books {
    /// The form's name.
    pub const FORM: &'static str = "books";

    /// Books of `dim` columns from groups and their entries (books x entries in use x width), rounded to `dtype`.
    pub fn new(dim: usize, bits: u32, dtype: CodebookDtype, groups: Vec<(GroupSpec, Vec<f32>)>) -> Result<Self> {
        let largest = groups.iter().flat_map(|(_, values)| values).fold(0f32, |m, v| m.max(v.abs()));
        let scale = if dtype == CodebookDtype::Float16 { power_of_two(largest) } else { 1.0 };
        let mut spec = BooksSpec { dim, bits, scale, dtype, groups: Vec::new() };
        let (mut tensors, mut scales) = (Vec::new(), Vec::new());
        for (index, (group, values)) in groups.into_iter().enumerate() {
            let shape = vec![group.starts.len(), 1 << bits, group.width];
            let mut padded: Vec<f32> = zeros("the codebooks", product(&shape))?;
            let (from, to) = (group.entries * group.width, group.width << bits);
            for (book, out) in values.chunks(from).zip(padded.chunks_mut(to)) {
                let scale = if dtype == CodebookDtype::Int8 { book_scale(book) } else { scale };
                scales.push(scale);
                out[..from].iter_mut().zip(book).for_each(|(o, v)| *o = v / scale);
            }
            let name = format!("codebooks.{index}");
            tensors.push(match dtype {
                CodebookDtype::Int8 => {
                    let entries: Vec<i8> = padded.iter().map(|v| v.round_ties_even().clamp(-TOP, TOP) as i8).collect();
                    Tensor::new(name, Dtype::I8, shape, Buffer::copy_of(bytemuck::cast_slice(&entries))?)?
                }
                _ => Tensor::of_floats(name, dtype.dtype(), shape, &padded)?,
            });
            spec.groups.push(group);
        }
        if dtype == CodebookDtype::Int8 {
            tensors.push(Tensor::of_floats("scales", Dtype::F32, vec![scales.len()], &scales)?);
        }
        Books::from_parts(spec, &tensors)
    }

    pub(super) fn from_parts(spec: BooksSpec, tensors: &[Tensor]) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.dim == 0 || spec.dim > 1 << 24 {
            return bad(format!("dim {}", spec.dim), "1 to 16777216 columns");
        }
        if spec.bits == 0 || spec.bits > bits::MAX_BITS {
            return bad(format!("{} bits", spec.bits), "1 to 24 bits");
        }
        if !(spec.scale.is_finite() && spec.scale > 0.0) {
            return bad(format!("scale {}", spec.scale), "a positive number");
        }
        let mut cover = vec![0u32; spec.dim];
        let mut kept = Vec::new();
        for (index, group) in spec.groups.iter().enumerate() {
            let entries = 1..=1 << spec.bits;
            if group.width == 0 || group.starts.is_empty() || !entries.contains(&group.entries) {
                let found = format!("group {index}: {} books of {} entries", group.starts.len(), group.entries);
                return bad(found, "books of at least one column and 1 to 2^bits entries");
            }
            // The shape first: columns of a book are counted only where its values were sent along.
            let shape = [group.starts.len(), 1 << spec.bits, group.width];
            kept.push(take(tensors, &format!("codebooks.{index}"), Some(spec.dtype.dtype()), &shape)?.clone());
            for start in &group.starts {
                match start.checked_add(group.width).filter(|end| *end <= spec.dim) {
                    Some(end) => cover[*start..end].iter_mut().for_each(|c| *c += 1),
                    None => return bad(format!("a book at column {start}"), "books inside the row"),
                }
            }
        }
        let scales = match spec.dtype {
            CodebookDtype::Int8 => {
                let books = spec.groups.iter().map(|group| group.starts.len()).sum();
                Some(take(tensors, "scales", Some(Dtype::F32), &[books])?.clone())
            }
            _ => None,
        };
        if kept.is_empty() || kept.len() + usize::from(scales.is_some()) != tensors.len() {
            return bad(format!("{} groups for {} tensors", kept.len(), tensors.len()), "one tensor for each group");
        }
        let tiled = cover.iter().all(|c| *c == 1);
        Ok(Books { spec, tensors: kept, scales, tiled })
    }

    /// Values in a row.
    pub fn dim(&self) -> usize {
        self.spec.dim
    }

    /// Bits of a field.
    pub fn bits(&self) -> u32 {
        self.spec.bits
    }

    /// Number of books, that is of fields in a row.
    pub fn len(&self) -> usize {
        self.spec.groups.iter().map(|g| g.starts.len()).sum()
    }

    /// Never true: there is at least one book.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of a row's code.
    pub fn row_bytes(&self) -> usize {
        bits::row_bytes(self.len(), self.spec.bits)
    }

    /// First column, width and entries in use (as float32, scale applied) of each book, in order.
    pub fn books(&self) -> Vec<(usize, usize, Vec<f32>)> {
        let mut books = Vec::new();
        let mut scales = self.scales().iter();
        for (group, tensor) in self.spec.groups.iter().zip(&self.tensors) {
            let values = tensor.to_floats();
            for (start, book) in group.starts.iter().zip(values.chunks(group.width << self.spec.bits)) {
                let used = &book[..group.entries * group.width];
                let scale = scales.next().unwrap_or(&self.spec.scale);
                books.push((*start, group.width, used.iter().map(|v| v * scale).collect()));
            }
        }
        books
    }

    /// The scale of each book, where entries are integers; else none.
    fn scales(&self) -> &[f32] {
        self.scales.as_ref().map_or(&[], Tensor::floats)
    }

    fn view(&self) -> BooksView<'_> {
        fn view<'a>((group, tensor): (&'a GroupSpec, &'a Tensor)) -> Group<'a> {
            let entries = match tensor.dtype {
                Dtype::F16 => Values::F16(tensor.halves()),
                Dtype::Bf16 => Values::Bf16(tensor.halves()),
                Dtype::I8 => Values::I8(tensor.integers()),
                _ => Values::F32(tensor.floats()),
            };
            Group { entries, width: group.width, starts: &group.starts }
        }
        let groups = self.spec.groups.iter().zip(&self.tensors).map(view).collect();
        let (dim, bits, scale) = (self.spec.dim, self.spec.bits, self.spec.scale);
        BooksView { dim, bits, row_bytes: self.row_bytes(), scale, scales: self.scales(), tiled: self.tiled, groups }
    }
}

impl Form for Books {
    fn name(&self) -> &'static str {
        Books::FORM
    }

    fn dim(&self) -> usize {
        self.spec.dim
    }

    fn row_bytes(&self) -> usize {
        bits::row_bytes(self.len(), self.spec.bits)
    }

    /// Earlier than others: what is written pushes the books out of the first caches.
    fn stream_bytes(&self) -> usize {
        1 << 20
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        self.decode(rows, out.into());
    }

    fn decode(&self, rows: &Rows, out: Output) {
        (kernels::best().lookup_books)(&self.view(), rows, out);
    }

    fn pool(&self, bags: &Bags, out: &mut [f32]) {
        (kernels::best().pool_books)(&self.view(), bags, out);
    }

    fn scorer(&self, query: &[f32], metric: Metric) -> Option<Scorer> {
        // A squared distance is a sum over books only where each column belongs to one book.
        let distance = match metric {
            Metric::InnerProduct => false,
            Metric::L2 if self.tiled => true,
            _ => return None,
        };
        let mut tables = vec![0f32; self.len() << self.spec.bits];
        for ((start, width, entries), table) in self.books().iter().zip(tables.chunks_mut(1 << self.spec.bits)) {
            let part = &query[*start..start + width];
            for (entry, score) in entries.chunks(*width).zip(table) {
                *score = part.iter().zip(entry).fold(0.0, |sum, (q, c)| {
                    let factor = if distance { (q - c) * (q - c) } else { q * c };
                    sum + factor
                });
            }
        }
        Some(Scorer { fields: self.len(), bits: self.spec.bits, tables, bias: 0.0 })
    }
    fn tensors(&self) -> Vec<Tensor> {
        self.tensors.iter().chain(&self.scales).cloned().collect()
    }

    fn spec(&self) -> Value {
        serde_json::to_value(&self.spec).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        let mut groups = Vec::new();
        let scales = match &self.scales {
            Some(scales) => take(tensors, "scales", None, &scales.shape)?.to_floats(),
            None => Vec::new(),
        };
        let mut scales = scales.into_iter();
        for (index, group) in self.spec.groups.iter().enumerate() {
            let shape = [group.starts.len(), 1 << self.spec.bits, group.width];
            let values = take(tensors, &format!("codebooks.{index}"), None, &shape)?.to_floats();
            let used = group.entries * group.width;
            let books = values.chunks(group.width << self.spec.bits).map(|book| &book[..used]);
            // Stored values carry the scale on the outside; `new` finds a fresh one.
            let scaled = books.flat_map(|book| {
                let scale = scales.next().unwrap_or(self.spec.scale);
                book.iter().map(move |v| v * scale)
            });
            groups.push((group.clone(), scaled.collect()));
        }
        Ok(Decoder::Books(Books::new(self.spec.dim, self.spec.bits, self.spec.dtype, groups)?))
    }
}

/// The power of two that brings `largest` into [1, 2); 1 for zero. By bits, so that every machine agrees.
pub(crate) fn power_of_two(largest: f32) -> f32 {
    match largest.to_bits() & 0x7f80_0000 {
        0 if largest == 0.0 => 1.0,
        0 => f32::MIN_POSITIVE,
        exponent => f32::from_bits(exponent),
    }
}
