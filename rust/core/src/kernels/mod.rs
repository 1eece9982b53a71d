//! The hot loops: one table of function pointers per instruction set, chosen once.
//!
//! [`scalar`] says what each kernel means. The other paths give the same bits: every value is made by the same chain of
//! fused multiply-adds in the same order, whatever the width of the vectors.

#[cfg(target_arch = "aarch64")]
mod arm;
mod scalar;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod simd;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::bits;
use std::ops::Range;
use std::sync::OnceLock;

/// Row ids, already validated: each is at least 0 and below the number of rows.
#[derive(Clone, Copy, Debug)]
pub enum Ids<'a> {
    /// `start`, `start + 1`, ...
    Range {
        /// The first id.
        start: usize,
        /// How many ids.
        len: usize,
    },
    /// 32-bit ids.
    I32(&'a [i32]),
    /// 64-bit ids.
    I64(&'a [i64]),
}

impl<'a> Ids<'a> {
    /// How many ids.
    pub fn len(&self) -> usize {
        match self {
            Ids::Range { len, .. } => *len,
            Ids::I32(ids) => ids.len(),
            Ids::I64(ids) => ids.len(),
        }
    }

    /// True for no ids.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The id at a position.
    #[inline(always)]
    pub fn get(&self, position: usize) -> usize {
        match self {
            Ids::Range { start, .. } => start + position,
            Ids::I32(ids) => ids[position] as usize,
            Ids::I64(ids) => ids[position] as usize,
        }
    }

    /// The ids at a range of positions.
    pub fn slice(&self, range: Range<usize>) -> Ids<'a> {
        match self {
            Ids::Range { start, len } => {
                assert!(range.start <= range.end && range.end <= *len, "positions {range:?} of {len} ids");
                Ids::Range { start: start + range.start, len: range.len() }
            }
            Ids::I32(ids) => Ids::I32(&ids[range]),
            Ids::I64(ids) => Ids::I64(&ids[range]),
        }
    }
}

/// Numbers in one of the types that tables keep.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Bit patterns of IEEE half precision.
    F16(&'a [u16]),
    /// Upper halves of single precision.
    Bf16(&'a [u16]),
    /// Integers, to be multiplied by their book's scale.
    I8(&'a [i8]),
}

impl Values<'_> {
    /// How many numbers.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::F16(values) | Values::Bf16(values) => values.len(),
            Values::I8(values) => values.len(),
        }
    }

    /// True for no numbers.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where decoded rows go, and in which type: half precision and bfloat16 are the float32 values rounded to nearest even.
#[derive(Debug)]
pub enum Output<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Bit patterns of IEEE half precision.
    F16(&'a mut [u16]),
    /// Upper halves of single precision.
    Bf16(&'a mut [u16]),
}

impl<'a> From<&'a mut [f32]> for Output<'a> {
    fn from(values: &'a mut [f32]) -> Self {
        Output::F32(values)
    }
}

impl<'a> From<&'a mut Vec<f32>> for Output<'a> {
    fn from(values: &'a mut Vec<f32>) -> Self {
        Output::F32(values)
    }
}

impl Output<'_> {
    /// How many values.
    pub fn len(&self) -> usize {
        match self {
            Output::F32(values) => values.len(),
            Output::F16(values) | Output::Bf16(values) => values.len(),
        }
    }

    /// True for no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Output::F32(values) => size_of_val(*values),
            Output::F16(values) | Output::Bf16(values) => size_of_val(*values),
        }
    }

    /// Ranges of rows of `dim` values, one after the other, each with its values.
    pub fn split(self, ranges: impl Iterator<Item = Range<usize>>, dim: usize) -> Vec<(Range<usize>, Self)> {
        let mut rest = self;
        let part = |range: Range<usize>| {
            let (part, after) = match std::mem::replace(&mut rest, Output::F32(&mut [])) {
                Output::F32(values) => {
                    let (part, after) = values.split_at_mut(range.len() * dim);
                    (Output::F32(part), Output::F32(after))
                }
                Output::F16(values) => {
                    let (part, after) = values.split_at_mut(range.len() * dim);
                    (Output::F16(part), Output::F16(after))
                }
                Output::Bf16(values) => {
                    let (part, after) = values.split_at_mut(range.len() * dim);
                    (Output::Bf16(part), Output::Bf16(after))
                }
            };
            rest = after;
            (range, part)
        };
        ranges.map(part).collect()
    }

    /// The values at a range of positions.
    pub fn slice(&mut self, range: Range<usize>) -> Output<'_> {
        match self {
            Output::F32(values) => Output::F32(&mut values[range]),
            Output::F16(values) => Output::F16(&mut values[range]),
            Output::Bf16(values) => Output::Bf16(&mut values[range]),
        }
    }
}

/// Codebooks of one shape: each has 2^bits entries of `width` values.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    /// The entries of all books, one book after the other.
    pub entries: Values<'a>,
    /// Values in an entry.
    pub width: usize,
    /// For each book the first column that its entries stand for.
    pub starts: &'a [usize],
}

/// Rows that are sums or joins of codebook entries. Code `m` of a row picks from book `m`, in the order of the groups.
#[derive(Clone, Debug)]
pub struct BooksView<'a> {
    /// Values in a row.
    pub dim: usize,
    /// Bits of one code.
    pub bits: u32,
    /// Bytes of a row of codes.
    pub row_bytes: usize,
    /// A power of two; entries are multiplied by it, but not integers.
    pub scale: f32,
    /// The scale of each book, where entries are integers; else none. Groups are all of integers, or none is.
    pub scales: &'a [f32],
    /// Each column belongs to one book: entries are stored. Else they are added, in order; a first book over all columns
    /// is still stored, and without one rows start as zeros.
    pub tiled: bool,
    /// The books.
    pub groups: Vec<Group<'a>>,
}

impl BooksView<'_> {
    /// Number of books.
    fn books(&self) -> usize {
        self.groups.iter().map(|group| group.starts.len()).sum()
    }

    /// What entries of book `m` are multiplied by.
    fn scale_of(&self, m: usize) -> f32 {
        self.scales.get(m).copied().unwrap_or(self.scale)
    }

    /// The first book is over all columns, or rows are tiled: nothing has to be cleared.
    fn stores_first(&self) -> bool {
        self.tiled || self.groups.first().is_some_and(|group| group.width == self.dim)
    }
}

/// Which rows of a table's codes a call reads.
#[derive(Clone, Debug)]
pub struct Rows<'a> {
    /// All codes.
    pub codes: &'a [u8],
    /// All ids of the call: rows of the ids that follow `range` are fetched ahead.
    pub ids: Ids<'a>,
    /// Positions of the ids that are read now.
    pub range: Range<usize>,
    /// The call's output is too large to be in the caches later: write past them.
    pub stream: bool,
}

impl Rows<'_> {
    /// The rows at a part of `range`, counted from its start.
    pub fn part(&self, part: Range<usize>) -> Self {
        Rows { range: self.range.start + part.start..self.range.start + part.end, ..*self }
    }
}

/// Bags of rows that are combined: sums start at zero and grow by `fma(weight, row, sum)` (weight 1 if there are none), a
/// maximum starts as the first row and takes larger values. No division: that is the caller's.
#[derive(Clone, Debug)]
pub struct Bags<'a> {
    /// Codes and ids; `range` is that of all bags here.
    pub rows: Rows<'a>,
    /// Where each bag starts, and where the last one ends: positions of ids.
    pub borders: &'a [i64],
    /// One weight an id.
    pub weights: Option<&'a [f32]>,
    /// The largest value instead of the sum.
    pub max: bool,
    /// Go on from what the output holds: the bag's earlier part.
    pub resume: bool,
}

/// How one value of a row is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
    /// An integer of 8 bits.
    U8,
    /// An integer of 4 bits.
    U4,
    /// An integer of 2 bits.
    U2,
    /// An integer of another width, from 1 to 8 bits.
    Bits(u32),
}

impl Level {
    /// Bits of one value.
    pub fn bits(self) -> u32 {
        match self {
            Level::F16 | Level::Bf16 => 16,
            Level::U8 => 8,
            Level::U4 => 4,
            Level::U2 => 2,
            Level::Bits(bits) => bits,
        }
    }
}

/// What a level stands for.
#[derive(Clone, Copy, Debug)]
pub enum Meaning<'a> {
    /// Itself: value = fma(level, scale, offset).
    Number,
    /// An entry of one table: value = scale * entry. The table has an entry for every level, and at least
    /// [`TABLE_ENTRIES`]. Columns have no offsets then.
    Table(&'a [f32]),
    /// An entry of the row's own: each block has, in place of its pair, 2^bits float16, to be multiplied by
    /// `scale_factor`.
    Own,
}

/// The least length of a table of [`Meaning::Table`]: whole vectors are read of it.
pub const TABLE_ENTRIES: usize = 16;

/// Where scale and offset come from: value = fma(level, scale, offset).
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// The value is the level itself.
    None,
    /// One pair a column.
    Columns {
        /// One scale a column.
        scale: &'a [f32],
        /// One offset a column.
        offset: &'a [f32],
    },
    /// Pairs at the end of each row's code, one for each block of columns, in order, as little-endian float16: the scale
    /// and then, unless `symmetric`, the minimum.
    Row {
        /// Columns that share a pair; the last block may be shorter.
        block: usize,
        /// Only scales are stored: offset = -scale * 2^(bits - 1).
        symmetric: bool,
        /// Scales take one byte: the bits 6 to 13 of a float16 whose other bits are zero. Needs `symmetric`.
        narrow: bool,
        /// A power of two; stored scales are multiplied by it.
        scale_factor: f32,
        /// A power of two; stored minima are multiplied by it.
        offset_factor: f32,
    },
}

/// Rows of levels: `dim` levels packed low bits first, padded to a whole byte, then the pairs (unaligned).
#[derive(Clone, Debug)]
pub struct LevelsView<'a> {
    /// Values in a row.
    pub dim: usize,
    /// Bytes of a row's code.
    pub row_bytes: usize,
    /// How a level is written.
    pub level: Level,
    /// What a level stands for.
    pub meaning: Meaning<'a>,
    /// Where scale and offset come from.
    pub scales: Scales<'a>,
}

impl LevelsView<'_> {
    /// Bytes of a row's levels, before the pairs.
    fn level_bytes(&self) -> usize {
        bits::row_bytes(self.dim, self.level.bits())
    }

    /// Bytes of what a block has behind the levels.
    fn pair_bytes(&self) -> usize {
        match (self.meaning, self.scales) {
            (Meaning::Own, _) => 2 << self.level.bits(),
            (_, Scales::Row { narrow: true, .. }) => 1,
            (Meaning::Number, Scales::Row { symmetric: false, .. }) => 4,
            _ => 2,
        }
    }
}

/// Where the window of a column starts in the stream of a row, and which table has its levels.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The byte of its first bit; unused where windows wrap.
    pub byte: u32,
    /// The bit of that byte; where windows wrap, the bit counted from the first one of the last whole window.
    pub shift: u32,
    /// The first level of its table.
    pub table: u32,
}

/// Rows of trellis codes: a circular stream of bits, padded to a whole byte together with the number of a scale behind it.
/// The window of `state_bits` bits from a column's place on picks a level; value = level * column's scale * row's scale.
#[derive(Clone, Copy, Debug)]
pub struct TrellisView<'a> {
    /// Values in a row.
    pub dim: usize,
    /// Bytes of a row's code.
    pub row_bytes: usize,
    /// Bits of the stream.
    pub bits: u32,
    /// Bits of a window, up to 16.
    pub state_bits: u32,
    /// Bits of the number of the row's scale.
    pub scale_bits: u32,
    /// Places of the columns.
    pub places: &'a [Place],
    /// So many columns at the end have windows that wrap.
    pub wrapped: usize,
    /// Tables of 2^state_bits levels, one after the other.
    pub levels: &'a [f32],
    /// Scale of each column.
    pub columns: &'a [f32],
    /// Scales of rows.
    pub scales: &'a [f32],
}

/// A column as [`Kernels::sweep`] meets it.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Bits that the stream gains.
    pub bits: u32,
    /// The first level of its table.
    pub table: u32,
    /// What levels are multiplied by.
    pub scale: f32,
}

/// The search for the best stream of a row, from the last column to the first: a step's bits go below those before.
#[derive(Clone, Copy, Debug)]
pub struct Sweep<'a> {
    /// Bits of a state, up to 16.
    pub state_bits: u32,
    /// The columns in the order of the search.
    pub steps: &'a [Step],
    /// Their values.
    pub values: &'a [f32],
    /// Tables of levels.
    pub levels: &'a [f32],
    /// The bits of the state before the first step that stay in it, if they are given.
    pub start: Option<u32>,
}

/// Numbers behind the last one of [`Kernels::sweep`]'s `least`, so that whole vectors can be read.
pub const SWEEP_PADDING: usize = 16;

/// Rows in panels of [`Kernels::panel_rows`], and the centres to compare them with.
#[derive(Clone, Copy, Debug)]
pub struct Panels<'a> {
    /// Values in a row.
    pub width: usize,
    /// `[panel][column][row of the panel]`, as [`Kernels::pack`] writes them; it may start at a later column.
    pub rows: &'a [f32],
    /// Values from one panel to the next: more than `width` columns where others follow.
    pub stride: usize,
    /// `[block][column][centre of the block]`, blocks of [`Kernels::block_centers`].
    pub centers: &'a [f32],
    /// Half of each centre's squared norm; infinity for centres that only fill the last block.
    pub half_norms: &'a [f32],
    /// What to write for each centre: 0, 1, ... A load from here is cheaper than making the numbers in the loop.
    pub labels: &'a [u32],
    /// What will likely be read after this call: it is fetched bit by bit meanwhile. Any address is fine.
    pub next: *const f32,
    /// How many values from there.
    pub next_values: usize,
}

/// Centres rounded to bfloat16, for [`Kernels::sift`].
#[derive(Clone, Copy, Debug)]
pub struct Coarse<'a> {
    /// `[block][pair of columns][centre of the block]`: two numbers a word, the first in the low half. An odd last column
    /// has a zero beside it. Numbers that are not normal are zero.
    pub pairs: &'a [u32],
    /// The largest norm of a centre, or more.
    pub reach: f32,
    /// The largest distance of a centre from the rounded one, or more.
    pub error: f32,
}

/// Room for [`Kernels::sift`].
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // no other CPU has the kernel yet
#[derive(Clone, Debug, Default)]
pub struct Sifting {
    /// Rounded rows.
    rows: Vec<u32>,
    /// The lowest score of each block of centres, for each row.
    minima: Vec<f32>,
    /// Rows, and blocks that may have their nearest centre.
    candidates: Vec<(u32, u32)>,
}

/// [`Kernels::sift`]: panels, rounded centres, room, then labels, lowest and second scores as in [`Kernels::nearest`].
pub type Sift = fn(&Panels, &Coarse, &mut Sifting, &mut [u32], &mut [f32], &mut [f32]) -> bool;

/// Row-major rows, and centres in panels of [`Kernels::panel_centers`].
#[derive(Clone, Copy, Debug)]
pub struct Products<'a> {
    /// Values in a row.
    pub width: usize,
    /// The first row's first value, and all that follow.
    pub x: &'a [f32],
    /// Values from one row's start to the next.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
    /// `[panel][column][centre of the panel]`, the last panel filled up with anything.
    pub centers: &'a [f32],
    /// Number of centres.
    pub count: usize,
}

/// Multiply-adds of single numbers in a round of [`Kernels::fma_peak`]: the same for all vector widths.
pub const PEAK_FMAS: usize = 3072;

/// Grids of levels, one a value: the value of level q, from 0 to `top`, is low + q * step.
#[derive(Clone, Copy, Debug)]
pub struct Grids<'a> {
    /// Distances between levels.
    pub steps: &'a [f32],
    /// Values of level 0.
    pub lows: &'a [f32],
    /// The highest level, 255 at most.
    pub top: f32,
}

/// Partial codes of some rows, and what a beam search needs to add one entry to each. All slices that are read by
/// entries hold [`BEAM_PADDING`] numbers more, so that whole vectors can be read.
#[derive(Clone, Copy, Debug)]
pub struct Extension<'a> {
    /// Number of rows.
    pub rows: usize,
    /// Partial codes a row.
    pub count: usize,
    /// Entries of the stage that is added.
    pub entries: usize,
    /// Entries of each partial code.
    pub stage: usize,
    /// Scores of the partial codes, row after row: half the squared error, less half the row's squared norm.
    pub scores: &'a [f32],
    /// Entry numbers of the partial codes.
    pub paths: &'a [u16],
    /// Half of the squared norm of each of the stage's entries, then NaN.
    pub half_norms: &'a [f32],
    /// Products of the rows with the stage's entries; without `tables`, of what each partial code leaves of its row.
    pub products: &'a [f32],
    /// For each stage before this one, products of its entries with this stage's: `[before][this]`.
    pub tables: &'a [Vec<f32>],
}

/// Codes of rows as sums of one entry of each book, and what an iterated local search needs to better them. Slices that
/// are read by entries hold [`BEAM_PADDING`] numbers more, so that whole vectors can be read.
#[derive(Clone, Copy, Debug)]
pub struct Descent<'a> {
    /// Number of rows.
    pub rows: usize,
    /// Entries of a book.
    pub entries: usize,
    /// For each book half of the squared norm of each entry, then NaN.
    pub half_norms: &'a [Vec<f32>],
    /// For each book the products of the rows with its entries, row after row.
    pub products: &'a [Vec<f32>],
    /// Products of all entries with each other, in half precision and over `scale`: `[book][other book][entry][other
    /// entry]`. Those of a book with itself are not read.
    pub pairs: &'a [u16],
    /// A power of two.
    pub scale: f32,
    /// Sweeps over the books at most, after the start and after each kick.
    pub sweeps: usize,
    /// What is tried one after the other.
    pub kicks: &'a [Kick],
}

/// A step away from the best code so far, in the hope that a better one is near.
#[derive(Clone, Debug)]
pub struct Kick {
    /// For each book how far its entry moves on, below the number of entries; most stay.
    pub shifts: Vec<usize>,
    /// All books, in the order in which they are visited.
    pub order: Vec<usize>,
}

/// See [`Extension`].
pub const BEAM_PADDING: usize = scalar::BEAM_LANES;

/// The kernels of one instruction set. All tables give the same bits.
pub struct Kernels {
    /// `scalar`, `avx2`, `avx512` or `neon`.
    pub name: &'static str,
    /// Rows in a panel of `pack` and `nearest`.
    pub panel_rows: usize,
    /// Centres in a block of `nearest`.
    pub block_centers: usize,
    /// Centres in a panel of `dots` and `distances`.
    pub panel_centers: usize,
    /// Decodes rows into `out`, `rows.range.len()` rows of `dim` values.
    pub lookup_books: fn(&BooksView, &Rows, Output),
    /// Decodes rows into `out`, `rows.range.len()` rows of `dim` values.
    pub lookup_levels: fn(&LevelsView, &Rows, Output),
    /// Combines decoded rows, a row of `dim` values of `out` for each bag.
    pub pool_books: fn(&BooksView, &Bags, &mut [f32]),
    /// Combines decoded rows, a row of `dim` values of `out` for each bag.
    pub pool_levels: fn(&LevelsView, &Bags, &mut [f32]),
    /// `pack(x, stride, rows, shift, out)`: transposes row-major rows less `shift` into panels; rows that only fill the
    /// last panel become zero. `out` holds whole panels of `shift.len()` columns.
    pub pack: fn(&[f32], usize, usize, &[f32], &mut [f32]),
    /// `nearest(panels, labels, best, second)`: for each row the centre of the lowest score `half_norm - <x, c>` (the
    /// first of equals), its score, and, unless `second` is empty, the next lowest score. One entry a panel row each.
    pub nearest: fn(&Panels, &mut [u32], &mut [f32], &mut [f32]),
    /// [`Kernels::nearest`] by way of bfloat16, where the CPU has that: faster where there are many values of centres.
    /// Labels and lowest scores are the same. False: too many centres are nearly as near, and nothing was found. A second
    /// score may be too high where it is above the lowest by more than 2^-21 ((width + 2) (r^2 / 2 + n r) + (n + r)^2),
    /// with n the row's norm and r the largest norm of a centre.
    pub sift: Option<Sift>,
    /// All scalar products, `out[row * count + centre]`.
    pub dots: fn(&Products, &mut [f32]),
    /// All squared distances, summed from differences, `out[row * count + centre]`.
    pub distances: fn(&Products, &mut [f32]),
    /// `extend(task, scores, paths)`: the best continuations of each row's partial codes by one more entry, best first; of
    /// equals the one of the first partial code, then of the lowest entry. `scores` has room for as many codes a row
    /// as are wanted, no more than there are, `paths` for their `stage + 1` entries.
    pub extend: fn(&Extension, &mut [f32], &mut [u16]),
    /// Decodes rows, `rows.range.len()` of them.
    pub decode_trellis: fn(&TrellisView, &Rows, &mut [f32]),
    /// `sweep(task, costs, least, back)`: for every state the squared error of the best stream that ends in it. A step of
    /// `b` bits, one at least, leaves in the next 2^(state_bits - b) bytes of `back` which top bits of the state before it
    /// are best for each of its heads, the state without its `b` lowest bits: the lowest of equals. `least` is room for
    /// the heads' costs, and [`SWEEP_PADDING`] numbers.
    pub sweep: fn(&Sweep, &mut [f32], &mut [f32], &mut [u8]),
    /// `hadamard(values, factor)`: the Walsh-Hadamard transform of 2^k values, times a factor.
    pub hadamard: fn(&mut [f32], f32),
    /// `descend(task, codes, scores)`: betters codes, one entry of each book a row, by iterated local search, and gives
    /// their scores: half the squared error, less half the row's squared norm. Each visit of a book takes the entry of the
    /// lowest score given the others, the first of equals; what a kick leads to is kept where its score is lower.
    pub descend: fn(&Descent, &mut [u16], &mut [f32]),
    /// `quantize(values, grids, levels)`: the nearest level to each value, halves up; 0 where the step is 0.
    pub quantize: fn(&[f32], &Grids, &mut [u8]),
    /// `grid_error(values, step, low, top)`: squared error of the values on a grid of levels 0 to `top`.
    pub grid_error: fn(&[f32], f32, f32, f32) -> f32,
    /// `axpy(out, x, weight)`: out = fma(weight, x, out).
    pub axpy: fn(&mut [f32], &[f32], f32),
    /// Half precision of single precision, rounded to nearest even.
    pub to_f16: fn(&[f32], &mut [u16]),
    /// Bfloat16 of single precision, rounded to nearest even. Numbers too small for a full mantissa are kept.
    pub to_bf16: fn(&[f32], &mut [u16]),
    /// `carries(words, mask, one)`: all of `(word & mask) + one` or-ed together. With the exponent's bits as `mask` and
    /// its lowest one as `one`, the bit above it is set if any exponent is full: NaN or infinity, in one pass.
    pub carries: fn(&[u32], u32, u32) -> u32,
    /// `fma_peak(rounds)`: does `rounds` times [`PEAK_FMAS`] fused multiply-adds from registers alone, as fast as the CPU
    /// can. The yardstick of benchmarks; the value is of no use and only keeps the work alive.
    pub fma_peak: fn(usize) -> f32,
}

/// Values that are decoded before they are rounded to a narrower type: enough rows to fetch ahead, few enough for the
/// first caches.
const ROUNDED: usize = 8192;

impl Kernels {
    /// Fills rows of `dim` values of any type; `decode(rows, out)` makes a range of them in single precision.
    pub fn write(&self, dim: usize, out: Output, mut decode: impl FnMut(Range<usize>, &mut [f32])) {
        let (out, round) = match out {
            Output::F32(out) => return decode(0..out.len() / dim, out),
            Output::F16(out) => (out, self.to_f16),
            Output::Bf16(out) => (out, self.to_bf16),
        };
        let step = (ROUNDED / dim).max(1);
        let mut rows = vec![0.0; (step * dim).min(out.len())];
        for (index, out) in out.chunks_mut(step * dim).enumerate() {
            let rows = &mut rows[..out.len()];
            decode(index * step..index * step + out.len() / dim, rows);
            round(rows, out);
        }
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Kernels({})", self.name)
    }
}

/// Combines rows that `decode` gives, a row of `out` for each bag: for forms without a kernel that adds in registers.
pub fn pool_rows(bags: &Bags, dim: usize, out: &mut [f32], decode: impl Fn(&Rows, &mut [f32])) {
    scalar::pool(bags, dim, out, decode);
}

/// The tables that this CPU can run, slowest first. The first is always `scalar`.
pub fn available() -> Vec<&'static Kernels> {
    #[cfg(target_arch = "x86_64")]
    let fast = x86::available();
    #[cfg(target_arch = "aarch64")]
    let fast = arm::available();
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let fast: Vec<&'static Kernels> = Vec::new();
    [vec![&scalar::KERNELS], fast].concat()
}

struct Choice {
    kernels: &'static Kernels,
    error: Option<String>,
}

/// The fastest table, or the one that `forced` names; a name that is not available gives the fastest and an error.
fn choose(forced: Option<&str>) -> Choice {
    let all = available();
    let kernels = *all.last().expect("scalar is always there");
    let Some(name) = forced.filter(|name| !name.is_empty()) else {
        return Choice { kernels, error: None };
    };
    match all.iter().find(|kernels| kernels.name == name) {
        Some(kernels) => Choice { kernels, error: None },
        None => {
            let names: Vec<&str> = all.iter().map(|kernels| kernels.name).collect();
            let error = format!("VQRS_SIMD={name} is not available here: expected one of {}", names.join(", "));
            Choice { kernels, error: Some(error) }
        }
    }
}

fn choice() -> &'static Choice {
    static CHOICE: OnceLock<Choice> = OnceLock::new();
    CHOICE.get_or_init(|| choose(std::env::var("VQRS_SIMD").ok().as_deref()))
}

/// The table to use: the fastest of this CPU, or the one that the environment variable `VQRS_SIMD` names.
pub fn best() -> &'static Kernels {
    choice().kernels
}

/// What is wrong with `VQRS_SIMD`, if anything; [`best`] then ignores it.
pub fn forced_error() -> Option<String> {
    choice().error.clone()
}

/// The preconditions of the kernels, checked once a call: with them no pointer of a fast path leaves its slice.
mod check {
    use super::{
        bits, Bags, BooksView, Descent, Extension, Grids, Level, LevelsView, Meaning, Output, Panels, Place, Products,
        Rows, Scales, Sweep, TrellisView, Values, BEAM_PADDING, SWEEP_PADDING, TABLE_ENTRIES,
    };

    fn output(rows: &Rows, dim: usize, row_bytes: usize, out: &Output) {
        assert!(dim > 0 && row_bytes > 0 && rows.range.start <= rows.range.end, "dim, row_bytes or range of rows");
        assert!(rows.range.end <= rows.ids.len(), "positions of ids");
        assert_eq!(Some(out.len()), rows.range.len().checked_mul(dim), "output of a lookup");
    }

    fn bags(bags: &Bags, dim: usize, out: &[f32]) {
        let fine = bags.borders.windows(2).all(|pair| pair[0] <= pair[1]);
        let ends = bags.borders.first().zip(bags.borders.last()).map(|(first, last)| *first as usize..*last as usize);
        assert!(fine && ends.as_ref() == Some(&bags.rows.range), "borders of bags");
        assert!(bags.rows.range.end <= bags.rows.ids.len(), "positions of ids");
        assert!(bags.weights.is_none_or(|weights| weights.len() == bags.rows.ids.len()), "weights of bags");
        assert_eq!(Some(out.len()), (bags.borders.len() - 1).checked_mul(dim), "output of bags");
    }

    fn books_view(view: &BooksView) {
        assert!(view.dim > 0 && (1..=bits::MAX_BITS).contains(&view.bits), "dim or bits of a books view");
        assert!(view.row_bytes >= bits::row_bytes(view.books().max(1), view.bits), "row_bytes of a books view");
        for group in &view.groups {
            let last = group.starts.iter().fold(0, |last, start| last.max(*start));
            assert!(group.width > 0 && last <= view.dim && group.width <= view.dim - last, "columns of a book");
            let scales = if matches!(group.entries, Values::I8(_)) { view.books() } else { 0 };
            assert_eq!(view.scales.len(), scales, "scales of books of integers");
            assert_eq!(group.entries.len(), (group.width << view.bits) * group.starts.len(), "entries of a book");
        }
    }

    pub(super) fn books(view: &BooksView, rows: &Rows, out: &Output) {
        books_view(view);
        output(rows, view.dim, view.row_bytes, out);
    }

    pub(super) fn pool_books(view: &BooksView, task: &Bags, out: &[f32]) {
        books_view(view);
        bags(task, view.dim, out);
    }

    pub(super) fn levels(view: &LevelsView, rows: &Rows, out: &Output) {
        levels_view(view);
        output(rows, view.dim, view.row_bytes, out);
    }

    pub(super) fn pool_levels(view: &LevelsView, task: &Bags, out: &[f32]) {
        levels_view(view);
        bags(task, view.dim, out);
    }

    fn levels_view(view: &LevelsView) {
        assert!(view.dim > 0 && view.row_bytes > 0, "dim or row_bytes of a levels view");
        let (bits, float) = (view.level.bits(), matches!(view.level, Level::F16 | Level::Bf16));
        assert!(float || (1..=8).contains(&bits), "bits of a levels view");
        match view.meaning {
            Meaning::Number => {}
            Meaning::Table(table) => assert!(!float && table.len() >= TABLE_ENTRIES.max(1 << bits), "table of levels"),
            Meaning::Own => assert!(!float && matches!(view.scales, Scales::Row { .. }), "levels of a row's own"),
        }
        let pairs = match view.scales {
            Scales::None => 0,
            Scales::Columns { scale, offset } => {
                let offsets = if matches!(view.meaning, Meaning::Number) { view.dim } else { offset.len() };
                assert!(scale.len() == view.dim && offset.len() == offsets, "scales of the columns");
                0
            }
            Scales::Row { block, symmetric, narrow, .. } => {
                let pairs = matches!(view.meaning, Meaning::Number) && !narrow;
                assert!(block > 0 && (symmetric || pairs), "block or symmetry of a levels view");
                view.dim.div_ceil(block) * view.pair_bytes()
            }
        };
        assert!(view.row_bytes >= view.level_bytes() + pairs, "row_bytes of a levels view");
    }

    pub(super) fn trellis(view: &TrellisView, rows: &Rows, out: &[f32]) {
        let row_bits = 8 * view.row_bytes as u64;
        assert!((1..=16).contains(&view.state_bits) && view.state_bits <= view.bits, "bits of a trellis view");
        assert!(u64::from(view.bits) + u64::from(view.scale_bits) <= row_bits, "row_bytes of a trellis view");
        assert_eq!(view.scales.len().checked_shr(view.scale_bits), Some(1), "scales of rows");
        assert!(view.places.len() == view.dim && view.columns.len() == view.dim, "columns of a trellis view");
        let (states, straight) = (1usize << view.state_bits, view.dim.checked_sub(view.wrapped));
        let (straight, wrapped) = view.places.split_at(straight.expect("wrapped columns"));
        let most = u64::from(view.bits - view.state_bits);
        let fits = |place: &Place| 8 * u64::from(place.byte) + u64::from(place.shift) <= most && place.shift < 8;
        assert!(straight.iter().all(fits), "places of a trellis view");
        assert!(wrapped.iter().all(|place| place.shift <= view.state_bits), "wrapped places of a trellis view");
        let tables = |place: &Place| place.table as usize + states <= view.levels.len();
        assert!(view.places.iter().all(tables), "levels of a trellis view");
        assert!(rows.range.start <= rows.range.end && rows.range.end <= rows.ids.len(), "positions of ids");
        assert_eq!(Some(out.len()), rows.range.len().checked_mul(view.dim), "output of a lookup");
    }

    pub(super) fn sweep(task: &Sweep, costs: &[f32], least: &[f32], back: &[u8]) {
        assert!((1..=16).contains(&task.state_bits) && task.steps.len() == task.values.len(), "steps of a sweep");
        let states = 1usize << task.state_bits;
        let mut bytes = 0;
        for step in task.steps {
            assert!(step.bits <= task.state_bits.min(8), "bits of a step");
            assert!(step.table as usize + states <= task.levels.len(), "levels of a step");
            bytes += if step.bits > 0 { states >> step.bits } else { 0 };
        }
        assert!(costs.len() == states && least.len() == states + SWEEP_PADDING, "costs of a sweep");
        assert_eq!(back.len(), bytes, "ways back of a sweep");
        let open = task.steps.first().map_or(0, |step| task.state_bits - step.bits);
        assert!(task.start.is_none_or(|start| start >> open == 0), "start of a sweep");
    }

    fn rows(x: &[f32], stride: usize, rows: usize, width: usize) {
        assert!(width > 0 && stride >= width, "width and stride of rows");
        assert!(rows == 0 || x.len() >= (rows - 1) * stride + width, "values of rows");
    }

    pub(super) fn pack(x: &[f32], stride: usize, count: usize, shift: &[f32], out: &[f32], panel: usize) {
        rows(x, stride, count, shift.len());
        assert_eq!(out.len(), count.div_ceil(panel) * panel * shift.len(), "packed rows");
    }

    pub(super) fn nearest(panels: &Panels, labels: &[u32], best: &[f32], second: &[f32], rows: usize, block: usize) {
        assert!(panels.width > 0 && labels.len().is_multiple_of(rows), "panels of rows");
        let (count, size) = (labels.len() / rows, panels.width * rows);
        assert!(panels.stride >= size, "stride of panels");
        assert!(count == 0 || panels.rows.len() >= (count - 1) * panels.stride + size, "packed rows");
        assert_eq!(panels.centers.len(), panels.half_norms.len() * panels.width, "packed centres");
        assert!(panels.half_norms.len().is_multiple_of(block), "blocks of centres");
        assert_eq!(panels.half_norms.len(), panels.labels.len(), "labels of centres");
        assert!(best.len() == labels.len() && (second.is_empty() || second.len() == labels.len()), "scores");
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn coarse(panels: &Panels, coarse: &super::Coarse, block: usize) {
        let blocks = panels.half_norms.len() / block;
        assert_eq!(coarse.pairs.len(), blocks * panels.width.div_ceil(2) * block, "rounded centres");
    }

    pub(super) fn products(task: &Products, out: &[f32], panel: usize) {
        rows(task.x, task.stride, task.rows, task.width);
        assert_eq!(task.centers.len(), task.count.next_multiple_of(panel) * task.width, "packed centres");
        assert_eq!(out.len(), task.rows * task.count, "output of products");
    }

    pub(super) fn top(top: f32) {
        assert!((0.0..=255.0).contains(&top), "highest level");
    }

    pub(super) fn quantize(values: &[f32], grids: &Grids, levels: &[u8]) {
        top(grids.top);
        let count = values.len();
        assert!(grids.steps.len() == count && grids.lows.len() == count && levels.len() == count, "grids of values");
    }

    /// Gives the number of partial codes that are wanted for each row.
    pub(super) fn extension(task: &Extension, scores: &[f32], paths: &[u16]) -> usize {
        let (partial, entries) = (task.rows * task.count, task.entries);
        assert!(task.count > 0 && (1..=1 << 16).contains(&entries), "partial codes and entries");
        assert!(task.count * (entries + BEAM_PADDING) <= u32::MAX as usize, "continuations of a row");
        assert!(task.scores.len() == partial && task.paths.len() == partial * task.stage, "partial codes");
        assert!(task.paths.iter().all(|entry| usize::from(*entry) < entries), "entries of partial codes");
        assert_eq!(task.half_norms.len(), entries + BEAM_PADDING, "half norms");
        assert!(task.half_norms[entries..].iter().all(|v| v.is_nan()), "padding of half norms");
        let products = if task.tables.is_empty() { partial } else { task.rows };
        assert!(task.products.len() >= products * entries + BEAM_PADDING, "products");
        assert!(task.tables.is_empty() || task.tables.len() == task.stage, "tables");
        assert!(task.tables.iter().all(|table| table.len() >= entries * entries + BEAM_PADDING), "tables");
        let keep = scores.len().checked_div(task.rows).unwrap_or(0);
        assert!(keep <= task.count * entries && scores.len() == task.rows * keep, "scores of continuations");
        assert_eq!(paths.len(), scores.len() * (task.stage + 1), "continuations");
        keep
    }

    pub(super) fn descent(task: &Descent, codes: &[u16], scores: &[f32]) {
        let (books, entries) = (task.half_norms.len(), task.entries);
        assert!(books > 0 && (1..=1 << 16).contains(&entries) && task.products.len() == books, "books and entries");
        assert!(task.half_norms.iter().all(|norms| norms.len() == entries + BEAM_PADDING), "half norms");
        assert!(
            task.half_norms.iter().flat_map(|norms| &norms[entries..]).all(|v| v.is_nan()),
            "padding of half norms"
        );
        assert!(task.products.iter().all(|p| p.len() >= task.rows * entries + BEAM_PADDING), "products");
        assert_eq!(task.pairs.len(), (books * entries).pow(2) + BEAM_PADDING, "products of entries");
        assert!(codes.len() == task.rows * books && scores.len() == task.rows, "codes and scores");
        assert!(codes.iter().all(|entry| usize::from(*entry) < entries), "entries of codes");
        for kick in task.kicks {
            assert!(kick.shifts.len() == books && kick.shifts.iter().all(|shift| *shift < entries), "shifts of a kick");
            assert!(kick.order.len() == books && kick.order.iter().all(|book| *book < books), "order of a kick");
        }
    }

    pub(super) fn pair<T>(out: &[T], x: &[f32]) {
        assert_eq!(out.len(), x.len(), "lengths of two vectors");
    }
}

#[cfg(all(test, target_os = "linux", not(miri)))]
pub(crate) mod fence;

/// Without pages to protect, memory is as ever.
#[cfg(all(test, not(all(target_os = "linux", not(miri)))))]
pub(crate) mod fence {
    pub(crate) struct Fence;

    impl Fence {
        pub(crate) fn new() -> Self {
            Fence
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
