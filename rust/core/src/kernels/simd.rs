//! One generic body per kernel, over a small trait of vector operations.
//!
//! The bodies are inlined into functions that switch an instruction set on for the whole loop; every body and every
//! operation is `inline(always)`, because a call across that border would pass vectors through memory.
//!
//! # Safety
//!
//! All functions here need the instruction set of their vector type. Each body checks its preconditions first (see
//! [`super::check`]); these and the sliced row of codes keep its pointers inside their slices.

use super::{check, scalar, BooksView, Ids, Level, LevelsView, Panels, Products, Scales, Values};
use crate::bits;

/// Rows between the one that is decoded and the one that is fetched from memory.
const AHEAD: usize = 48;

/// A vector of `f32`.
pub(super) trait Simd: Copy {
    /// Numbers in a vector.
    const LANES: usize;
    /// The same number in all lanes.
    unsafe fn splat(value: f32) -> Self;
    /// Reads `LANES` numbers, aligned or not.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes `LANES` numbers, aligned or not.
    unsafe fn store(self, to: *mut f32);
    /// self + other.
    unsafe fn add(self, other: Self) -> Self;
    /// self - other.
    unsafe fn sub(self, other: Self) -> Self;
    /// self * other.
    unsafe fn mul(self, other: Self) -> Self;
    /// self * factor + sum, rounded once.
    unsafe fn fma(self, factor: Self, sum: Self) -> Self;
    /// sum - self * factor, rounded once.
    unsafe fn fnma(self, factor: Self, sum: Self) -> Self;
    /// self < other ? yes : no, lane by lane.
    unsafe fn less(self, other: Self, yes: Self, no: Self) -> Self;
    /// self < other ? self : other.
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { self.less(other, self, other) }
    }
    /// self > other ? self : other.
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { other.less(self, self, other) }
    }
}

/// Vectors that read narrower numbers: what lookups need. Pointers may be unaligned.
pub(super) trait Widen: Simd {
    /// Reads `LANES` numbers of half precision.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Reads `LANES` numbers of bfloat16.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Reads `LANES` bytes.
    unsafe fn load_u8(from: *const u8) -> Self;
    /// Reads `LANES` nibbles, low bits first.
    unsafe fn load_u4(from: *const u8) -> Self;
    /// Reads `LANES` pairs of bits, low bits first.
    unsafe fn load_u2(from: *const u8) -> Self;
    /// One number of half precision.
    unsafe fn one_f16(bits: u16) -> f32;
    /// Asks for a cache line. Any address is fine.
    fn prefetch(address: *const u8);
}

/// Type of the values of a codebook.
trait Entry: Copy {
    unsafe fn load<S: Widen>(from: *const Self) -> S;
    unsafe fn one<S: Widen>(self) -> f32;
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct F16(u16);

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Bf16(u16);

impl Entry for f32 {
    #[inline(always)]
    unsafe fn load<S: Widen>(from: *const f32) -> S {
        // SAFETY: passed on to the caller.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    unsafe fn one<S: Widen>(self) -> f32 {
        self
    }
}

impl Entry for F16 {
    #[inline(always)]
    unsafe fn load<S: Widen>(from: *const F16) -> S {
        // SAFETY: passed on to the caller; `F16` is a transparent `u16`.
        unsafe { S::load_f16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn one<S: Widen>(self) -> f32 {
        // SAFETY: passed on to the caller.
        unsafe { S::one_f16(self.0) }
    }
}

impl Entry for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Widen>(from: *const Bf16) -> S {
        // SAFETY: passed on to the caller; `Bf16` is a transparent `u16`.
        unsafe { S::load_bf16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn one<S: Widen>(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// Field `index` of the row of codes that starts `tail`. Reads four bytes at once where `tail` has them.
#[inline(always)]
fn field(tail: &[u8], bits: u32, index: usize) -> usize {
    let (at, shift) = (index * bits as usize / 8, index * bits as usize % 8);
    match tail.get(at..at + 4) {
        Some(word) => {
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            ((word >> shift) & ((1 << bits) - 1)) as usize
        }
        None => bits::get(tail, bits, index) as usize,
    }
}

/// Code `index` of the row that starts `tail`. `BITS`: 8 or 4 if that is known, else 0.
#[inline(always)]
fn code<const BITS: u32>(tail: &[u8], bits: u32, index: usize) -> usize {
    match BITS {
        8 => tail[index] as usize,
        4 => (tail[index / 2] >> (index % 2 * 4) & 15) as usize,
        _ => field(tail, bits, index),
    }
}

/// The codes from the row at `position` to the end, with a row further on asked for.
#[inline(always)]
fn row_codes<'a, S: Widen>(codes: &'a [u8], row_bytes: usize, ids: &Ids, position: usize) -> &'a [u8] {
    if position + AHEAD < ids.len() {
        let next = codes.as_ptr().wrapping_add(ids.get(position + AHEAD).wrapping_mul(row_bytes));
        for line in (0..row_bytes).step_by(64) {
            S::prefetch(next.wrapping_add(line));
        }
        // The last byte may stand in one line more.
        S::prefetch(next.wrapping_add(row_bytes - 1));
    }
    let tail = &codes[ids.get(position).wrapping_mul(row_bytes)..];
    assert!(tail.len() >= row_bytes, "an id outside the codes");
    tail
}

/// Which loop decodes a view fastest.
enum Form {
    /// Narrow parts of equal width side by side: gather the entries of several rows, then convert them in one go.
    Narrow,
    /// Parts of equal width side by side, wide enough for vectors.
    Wide,
    /// Full rows that are added: sum in registers.
    Sum,
    /// Everything else, book after book.
    Any,
}

fn form(view: &BooksView, lanes: usize) -> Form {
    let Some(first) = view.books.first() else { return Form::Any };
    if !view.books.iter().all(|book| book.width == first.width && same_type(book.entries, first.entries)) {
        return Form::Any;
    }
    let beside = view.books.iter().enumerate().all(|(m, book)| book.store && book.start == m * book.width);
    if beside && view.books.len() * first.width == view.dim {
        match first.width {
            width if width >= lanes => return Form::Wide,
            1 | 2 | 3 | 4 | 6 if view.dim <= SCRATCH => return Form::Narrow,
            _ => return Form::Any,
        }
    }
    let added = (first.store || view.zero_first) && view.books[1..].iter().all(|book| !book.store);
    if added && first.width == view.dim {
        return Form::Sum;
    }
    Form::Any
}

fn same_type(a: Values, b: Values) -> bool {
    use Values::{Bf16, F16, F32};
    matches!((a, b), (F32(_), F32(_)) | (F16(_), F16(_)) | (Bf16(_), Bf16(_)))
}

#[inline(always)]
pub(super) unsafe fn lookup_books<S: Widen>(view: &BooksView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    check::books(view, &ids, out);
    // SAFETY: the view was checked; the instruction set is the caller's.
    unsafe {
        match view.bits {
            8 => lookup_coded::<S, 8>(view, codes, ids, out),
            4 => lookup_coded::<S, 4>(view, codes, ids, out),
            _ => lookup_coded::<S, 0>(view, codes, ids, out),
        }
    }
}

#[inline(always)]
unsafe fn lookup_coded<S: Widen, const BITS: u32>(view: &BooksView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    let entries = view.books.first().map(|book| book.entries);
    // SAFETY: a form promises that all books have the type of the first.
    unsafe {
        match (form(view, S::LANES), entries) {
            (Form::Narrow, Some(Values::F32(_))) => narrow::<S, f32, BITS>(view, codes, ids, out),
            (Form::Narrow, Some(Values::F16(_))) => narrow::<S, F16, BITS>(view, codes, ids, out),
            (Form::Narrow, Some(Values::Bf16(_))) => narrow::<S, Bf16, BITS>(view, codes, ids, out),
            (Form::Wide, Some(Values::F32(_))) => wide::<S, f32, BITS>(view, codes, ids, out),
            (Form::Wide, Some(Values::F16(_))) => wide::<S, F16, BITS>(view, codes, ids, out),
            (Form::Wide, Some(Values::Bf16(_))) => wide::<S, Bf16, BITS>(view, codes, ids, out),
            (Form::Sum, Some(Values::F32(_))) => sum::<S, f32, BITS>(view, codes, ids, out),
            (Form::Sum, Some(Values::F16(_))) => sum::<S, F16, BITS>(view, codes, ids, out),
            (Form::Sum, Some(Values::Bf16(_))) => sum::<S, Bf16, BITS>(view, codes, ids, out),
            _ => any::<S, BITS>(view, codes, ids, out),
        }
    }
}

fn first_entry<T>(values: Values) -> *const T {
    match values {
        Values::F32(values) => values.as_ptr().cast(),
        Values::F16(values) | Values::Bf16(values) => values.as_ptr().cast(),
    }
}

#[inline(always)]
unsafe fn any<S: Widen, const BITS: u32>(view: &BooksView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    for (position, out) in out.chunks_exact_mut(view.dim).enumerate() {
        let tail = row_codes::<S>(codes, view.row_bytes, &ids, position);
        if view.zero_first {
            out.fill(0.0);
        }
        for (m, book) in view.books.iter().enumerate() {
            let first = code::<BITS>(tail, view.bits, m) * book.width;
            let out = &mut out[book.start..book.start + book.width];
            // SAFETY: a code is below 2^bits and the book has `width << bits` values.
            unsafe {
                match book.entries {
                    Values::F32(e) => place::<S, f32>(e.as_ptr().add(first), view.scale, book.store, out),
                    Values::F16(e) => place::<S, F16>(e.as_ptr().add(first).cast(), view.scale, book.store, out),
                    Values::Bf16(e) => place::<S, Bf16>(e.as_ptr().add(first).cast(), view.scale, book.store, out),
                }
            }
        }
    }
}

/// Puts or adds one entry of `out.len()` values.
#[inline(always)]
unsafe fn place<S: Widen, E: Entry>(entry: *const E, scale: f32, store: bool, out: &mut [f32]) {
    let whole = out.len() - out.len() % S::LANES;
    // SAFETY: the entry has as many values as `out`.
    unsafe {
        let factor = S::splat(scale);
        for t in (0..whole).step_by(S::LANES) {
            let (value, to) = (E::load::<S>(entry.add(t)), out.as_mut_ptr().add(t));
            if store {
                value.mul(factor).store(to);
            } else {
                value.fma(factor, S::load(to)).store(to);
            }
        }
        for t in whole..out.len() {
            let value = (*entry.add(t)).one::<S>();
            out[t] = if store { value * scale } else { value.mul_add(scale, out[t]) };
        }
    }
}

#[inline(always)]
unsafe fn wide<S: Widen, E: Entry, const BITS: u32>(view: &BooksView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    // SAFETY: the vectors that are promised are those of the width.
    unsafe {
        match view.books[0].width {
            width if width == S::LANES => parts::<S, E, 1, BITS>(view, codes, ids, out),
            width if width == 2 * S::LANES => parts::<S, E, 2, BITS>(view, codes, ids, out),
            _ => parts::<S, E, 0, BITS>(view, codes, ids, out),
        }
    }
}

/// `VECTORS`: vectors of a part if they are 1 or 2 and cover it, else 0.
#[inline(always)]
unsafe fn parts<S: Widen, E: Entry, const VECTORS: usize, const BITS: u32>(
    view: &BooksView,
    codes: &[u8],
    ids: Ids,
    out: &mut [f32],
) {
    let books: Vec<*const E> = view.books.iter().map(|book| first_entry(book.entries)).collect();
    let width = if VECTORS == 0 { view.books[0].width } else { VECTORS * S::LANES };
    for (position, out) in out.chunks_exact_mut(view.dim).enumerate() {
        let tail = row_codes::<S>(codes, view.row_bytes, &ids, position);
        for (m, out) in out.chunks_exact_mut(width).enumerate() {
            // SAFETY: a code is below 2^bits and the book has `width << bits` values. The last vector of a part ends with
            // it and may overlap the one before.
            unsafe {
                let entry = books[m].add(code::<BITS>(tail, view.bits, m) * width);
                let scale = S::splat(view.scale);
                for t in (0..width).step_by(S::LANES) {
                    let t = if VECTORS == 0 { t.min(width - S::LANES) } else { t };
                    E::load::<S>(entry.add(t)).mul(scale).store(out.as_mut_ptr().add(t));
                }
            }
        }
    }
}

/// Vectors of a row that [`sum`] keeps in registers.
const SUMS: usize = 4;

#[inline(always)]
unsafe fn sum<S: Widen, E: Entry, const BITS: u32>(view: &BooksView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    let books: Vec<*const E> = view.books.iter().map(|book| first_entry(book.entries)).collect();
    for (position, out) in out.chunks_exact_mut(view.dim).enumerate() {
        let tail = row_codes::<S>(codes, view.row_bytes, &ids, position);
        let entry = |m: usize| books[m].wrapping_add(code::<BITS>(tail, view.bits, m) * view.dim);
        let mut t = 0;
        // SAFETY: a code is below 2^bits and each book has `dim << bits` values; `t` stays inside the row.
        unsafe {
            while t + SUMS * S::LANES <= view.dim {
                sum_columns::<S, E, SUMS>(view, books.len(), entry, t, out);
                t += SUMS * S::LANES;
            }
            while t + S::LANES <= view.dim {
                sum_columns::<S, E, 1>(view, books.len(), entry, t, out);
                t += S::LANES;
            }
            for t in t..view.dim {
                let value = |m: usize| (*entry(m).add(t)).one::<S>();
                let first = if view.books[0].store { value(0) * view.scale } else { value(0).mul_add(view.scale, 0.0) };
                out[t] = (1..books.len()).fold(first, |sum, m| value(m).mul_add(view.scale, sum));
            }
        }
    }
}

/// `N` vectors of a row from column `t`.
#[inline(always)]
unsafe fn sum_columns<S: Widen, E: Entry, const N: usize>(
    view: &BooksView,
    books: usize,
    entry: impl Fn(usize) -> *const E,
    t: usize,
    out: &mut [f32],
) {
    // SAFETY: `N` vectors from `t` lie inside the row.
    unsafe {
        let scale = S::splat(view.scale);
        let mut sums = [S::splat(0.0); N];
        for m in 0..books {
            let from = entry(m).add(t);
            for v in 0..N {
                let value = E::load::<S>(from.add(v * S::LANES));
                // A stored -0 must not become 0 + -0 = 0.
                let stored = m == 0 && view.books[0].store;
                sums[v] = if stored { value.mul(scale) } else { value.fma(scale, sums[v]) };
            }
        }
        for v in 0..N {
            sums[v].store(out.as_mut_ptr().add(t + v * S::LANES));
        }
    }
}

/// Values that [`narrow`] gathers before it converts them: they stay in the first level cache, and the wide loads come
/// long enough after the narrow stores not to wait for them.
const SCRATCH: usize = 1024;

#[inline(always)]
unsafe fn narrow<S: Widen, E: Entry, const BITS: u32>(view: &BooksView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    // SAFETY: the width that is matched is the width of the books.
    unsafe {
        match view.books[0].width {
            1 => gather::<S, E, 1, BITS>(view, codes, ids, out),
            2 => gather::<S, E, 2, BITS>(view, codes, ids, out),
            3 => gather::<S, E, 3, BITS>(view, codes, ids, out),
            4 => gather::<S, E, 4, BITS>(view, codes, ids, out),
            6 => gather::<S, E, 6, BITS>(view, codes, ids, out),
            _ => any::<S, BITS>(view, codes, ids, out),
        }
    }
}

#[inline(always)]
unsafe fn gather<S: Widen, E: Entry, const WIDTH: usize, const BITS: u32>(
    view: &BooksView,
    codes: &[u8],
    ids: Ids,
    out: &mut [f32],
) {
    let books: Vec<*const [E; WIDTH]> = view.books.iter().map(|book| first_entry(book.entries)).collect();
    let mut scratch = [const { std::mem::MaybeUninit::<E>::uninit() }; SCRATCH];
    let rows = SCRATCH / view.dim;
    for (batch, out) in out.chunks_mut(rows * view.dim).enumerate() {
        let mut to = scratch.as_mut_ptr().cast::<[E; WIDTH]>();
        for row in 0..out.len() / view.dim {
            let tail = row_codes::<S>(codes, view.row_bytes, &ids, batch * rows + row);
            for (m, book) in books.iter().enumerate() {
                // SAFETY: a code is below 2^bits, which is the number of entries; `rows` rows of `dim` values fit the
                // scratch.
                unsafe {
                    to.write(*book.add(code::<BITS>(tail, view.bits, m)));
                    to = to.add(1);
                }
            }
        }
        // SAFETY: `out.len()` values of the scratch were written just now.
        unsafe { place::<S, E>(scratch.as_ptr().cast(), view.scale, true, out) };
    }
}

/// How a level is read: [`Level`] as a type, so that each has its own loop.
trait Reader {
    const LEVEL: Level;
    /// Reads `LANES` levels.
    unsafe fn load<S: Widen>(from: *const u8) -> S;
}

macro_rules! reader {
    ($name:ident, $level:ident, $load:ident) => {
        struct $name;
        impl Reader for $name {
            const LEVEL: Level = Level::$level;
            #[inline(always)]
            unsafe fn load<S: Widen>(from: *const u8) -> S {
                // SAFETY: passed on to the caller.
                unsafe { S::$load(from.cast()) }
            }
        }
    };
}

reader!(ReadF16, F16, load_f16);
reader!(ReadBf16, Bf16, load_bf16);
reader!(ReadU8, U8, load_u8);
reader!(ReadU4, U4, load_u4);
reader!(ReadU2, U2, load_u2);

#[inline(always)]
pub(super) unsafe fn lookup_levels<S: Widen>(view: &LevelsView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    check::levels(view, &ids, out);
    if let Scales::Row { block, .. } = view.scales {
        // Vectors start on whole bytes; blocks that do not are rare enough for the plain loop.
        if block < view.dim && !(block * view.level.bits() as usize).is_multiple_of(8) {
            return scalar::lookup_levels(view, codes, ids, out);
        }
    }
    // SAFETY: the view was checked; the instruction set is the caller's.
    unsafe {
        match view.level {
            Level::F16 => levels::<S, ReadF16>(view, codes, ids, out),
            Level::Bf16 => levels::<S, ReadBf16>(view, codes, ids, out),
            Level::U8 => levels::<S, ReadU8>(view, codes, ids, out),
            Level::U4 => levels::<S, ReadU4>(view, codes, ids, out),
            Level::U2 => levels::<S, ReadU2>(view, codes, ids, out),
        }
    }
}

#[inline(always)]
unsafe fn levels<S: Widen, R: Reader>(view: &LevelsView, codes: &[u8], ids: Ids, out: &mut [f32]) {
    let level_bytes = view.level_bytes();
    for (position, out) in out.chunks_exact_mut(view.dim).enumerate() {
        let code = row_codes::<S>(codes, view.row_bytes, &ids, position);
        // SAFETY: the row has `dim` levels, whole blocks of which start on whole bytes, and a pair for each block.
        unsafe {
            match view.scales {
                Scales::None => span::<S, R>(code, out, Plain),
                Scales::Columns { scale, offset } => span::<S, R>(code, out, PerColumn { scale, offset }),
                Scales::Row { block, .. } => {
                    let block_bytes = block * R::LEVEL.bits() as usize / 8;
                    for (index, out) in out.chunks_mut(block).enumerate() {
                        let (scale, offset) = pair::<S, R>(view, &code[level_bytes..], index);
                        span::<S, R>(&code[index * block_bytes..], out, Shared { scale, offset });
                    }
                }
            }
        }
    }
}

/// Scale and offset of a block, as [`scalar::pair_at`] has it but with the CPU's own conversion.
#[inline(always)]
unsafe fn pair<S: Widen, R: Reader>(view: &LevelsView, pairs: &[u8], index: usize) -> (f32, f32) {
    let Scales::Row { symmetric, scale_factor, offset_factor, .. } = view.scales else { unreachable!() };
    // SAFETY: the instruction set is the caller's.
    unsafe {
        if symmetric {
            let scale = S::one_f16(scalar::half_at(pairs, index)) * scale_factor;
            (scale, -scale * (1u32 << (R::LEVEL.bits() - 1)) as f32)
        } else {
            let scale = S::one_f16(scalar::half_at(pairs, 2 * index)) * scale_factor;
            (scale, S::one_f16(scalar::half_at(pairs, 2 * index + 1)) * offset_factor)
        }
    }
}

/// What makes a value of a level.
trait Affine {
    unsafe fn vector<S: Simd>(&self, level: S, t: usize) -> S;
    fn one(&self, level: f32, t: usize) -> f32;
}

struct Plain;

struct PerColumn<'a> {
    scale: &'a [f32],
    offset: &'a [f32],
}

struct Shared {
    scale: f32,
    offset: f32,
}

impl Affine for Plain {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, level: S, _: usize) -> S {
        level
    }
    #[inline(always)]
    fn one(&self, level: f32, _: usize) -> f32 {
        level
    }
}

impl Affine for PerColumn<'_> {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, level: S, t: usize) -> S {
        // SAFETY: scales and offsets have a value for each column, and a vector from `t` stays inside the columns.
        unsafe { level.fma(S::load(self.scale.as_ptr().add(t)), S::load(self.offset.as_ptr().add(t))) }
    }
    #[inline(always)]
    fn one(&self, level: f32, t: usize) -> f32 {
        level.mul_add(self.scale[t], self.offset[t])
    }
}

impl Affine for Shared {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, level: S, _: usize) -> S {
        // SAFETY: the instruction set is the caller's.
        unsafe { level.fma(S::splat(self.scale), S::splat(self.offset)) }
    }
    #[inline(always)]
    fn one(&self, level: f32, _: usize) -> f32 {
        level.mul_add(self.scale, self.offset)
    }
}

/// `out.len()` levels from the start of `code`.
#[inline(always)]
unsafe fn span<S: Widen, R: Reader>(code: &[u8], out: &mut [f32], affine: impl Affine) {
    let whole = out.len() - out.len() % S::LANES;
    for t in (0..whole).step_by(S::LANES) {
        // SAFETY: `code` holds all levels of `out`; a multiple of the lanes (4 at least, of 2 bits) is whole bytes.
        unsafe {
            let level = R::load::<S>(code.as_ptr().add(t * R::LEVEL.bits() as usize / 8));
            affine.vector(level, t).store(out.as_mut_ptr().add(t));
        }
    }
    for t in whole..out.len() {
        out[t] = affine.one(scalar::level_at(R::LEVEL, code, t), t);
    }
}

/// `NV` vectors of rows against blocks of `NC` centres.
#[inline(always)]
pub(super) unsafe fn nearest<S: Simd, const NV: usize, const NC: usize>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    check::nearest(panels, labels, best, second, NV * S::LANES, NC);
    labels.fill(0);
    best.fill(f32::INFINITY);
    second.fill(f32::INFINITY);
    let seconds = !second.is_empty();
    // SAFETY: everything was checked; the instruction set is the caller's.
    unsafe {
        match (panels.width, seconds) {
            (1, _) => narrow_rows::<S, NV, NC, 1>(panels, labels, best, second),
            (2, _) => narrow_rows::<S, NV, NC, 2>(panels, labels, best, second),
            (3, _) => narrow_rows::<S, NV, NC, 3>(panels, labels, best, second),
            (4, _) => narrow_rows::<S, NV, NC, 4>(panels, labels, best, second),
            (_, false) => tiles::<S, NV, NC, false>(panels, labels, best, second),
            (_, true) => tiles::<S, NV, NC, true>(panels, labels, best, second),
        }
    }
}

/// The lowest scores of a vector of rows so far, and whose they are. Labels travel as bit patterns of `f32`, which
/// selections do not change.
#[derive(Clone, Copy)]
struct Lowest<S> {
    best: S,
    second: S,
    label: S,
}

impl<S: Simd> Lowest<S> {
    /// Reads the entries from `at`; `second` only if `SECOND`.
    #[inline(always)]
    unsafe fn load<const SECOND: bool>(labels: &[u32], best: &[f32], second: &[f32], at: usize) -> Self {
        // SAFETY: the caller's slices have a vector from `at`.
        unsafe {
            let best = S::load(best.as_ptr().add(at));
            let second = if SECOND { S::load(second.as_ptr().add(at)) } else { best };
            Lowest { best, second, label: S::load(labels.as_ptr().add(at).cast()) }
        }
    }

    #[inline(always)]
    unsafe fn store<const SECOND: bool>(self, labels: &mut [u32], best: &mut [f32], second: &mut [f32], at: usize) {
        // SAFETY: the caller's slices have a vector from `at`.
        unsafe {
            self.best.store(best.as_mut_ptr().add(at));
            self.label.store(labels.as_mut_ptr().add(at).cast());
            if SECOND {
                self.second.store(second.as_mut_ptr().add(at));
            }
        }
    }

    /// Takes note of the scores of the centre `label`.
    #[inline(always)]
    unsafe fn update<const SECOND: bool>(&mut self, score: S, label: S) {
        // SAFETY: the instruction set is the caller's.
        unsafe {
            if SECOND {
                self.second = score.max(self.best).min(self.second);
            }
            self.label = score.less(self.best, label, self.label);
            self.best = score.min(self.best);
        }
    }
}

/// Up to 4 columns: all vectors of a panel at once, unless the second scores need their registers.
#[inline(always)]
unsafe fn narrow_rows<S: Simd, const NV: usize, const NC: usize, const WIDTH: usize>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    // SAFETY: passed on to the caller.
    unsafe {
        if second.is_empty() {
            rows_in_registers::<S, NV, NC, WIDTH, NV, false>(panels, labels, best, second);
        } else {
            rows_in_registers::<S, NV, NC, WIDTH, 1, true>(panels, labels, best, second);
        }
    }
}

/// Few columns, as in product quantization: `VECTORS` vectors of rows stay in registers while all centres pass by.
#[inline(always)]
unsafe fn rows_in_registers<
    S: Simd,
    const NV: usize,
    const NC: usize,
    const WIDTH: usize,
    const VECTORS: usize,
    const SECOND: bool,
>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    // Unrolled by the compiler, the loop over the centres of a block would keep more in flight than there are registers.
    let block_centers = std::hint::black_box(NC);
    for at in (0..labels.len()).step_by(VECTORS * S::LANES) {
        let (panel, v0) = (at / (NV * S::LANES), at / S::LANES % NV);
        // SAFETY: `VECTORS` divides `NV`, so that the vectors from `at` belong to one panel; blocks are whole.
        unsafe {
            let rows = panels.rows.as_ptr().add((panel * WIDTH * NV + v0) * S::LANES);
            let mut x = [[S::splat(0.0); VECTORS]; WIDTH];
            let mut low = [Lowest { best: x[0][0], second: x[0][0], label: x[0][0] }; VECTORS];
            for v in 0..VECTORS {
                for t in 0..WIDTH {
                    x[t][v] = S::load(rows.add((t * NV + v) * S::LANES));
                }
                low[v] = Lowest::load::<SECOND>(labels, best, second, at + v * S::LANES);
            }
            let blocks = panels.half_norms.chunks_exact(NC).zip(panels.labels.chunks_exact(NC));
            for (block, (half_norms, names)) in blocks.enumerate() {
                let centers = panels.centers.as_ptr().add(block * WIDTH * NC);
                for j in 0..block_centers {
                    let mut score = [S::splat(*half_norms.as_ptr().add(j)); VECTORS];
                    for t in 0..WIDTH {
                        let c = S::splat(*centers.add(t * NC + j));
                        for v in 0..VECTORS {
                            score[v] = x[t][v].fnma(c, score[v]);
                        }
                    }
                    let label = S::splat(f32::from_bits(*names.as_ptr().add(j)));
                    for v in 0..VECTORS {
                        low[v].update::<SECOND>(score[v], label);
                    }
                }
            }
            for v in 0..VECTORS {
                low[v].store::<SECOND>(labels, best, second, at + v * S::LANES);
            }
        }
    }
}

/// Any number of columns: blocks of centres against panels of rows.
#[inline(always)]
unsafe fn tiles<S: Simd, const NV: usize, const NC: usize, const SECOND: bool>(
    panels: &Panels,
    labels: &mut [u32],
    best: &mut [f32],
    second: &mut [f32],
) {
    let width = panels.width;
    let blocks = panels.centers.chunks_exact(width * NC).zip(panels.half_norms.chunks_exact(NC));
    for ((centers, half_norms), names) in blocks.zip(panels.labels.chunks_exact(NC)) {
        for (panel, rows) in panels.rows.chunks_exact(width * NV * S::LANES).enumerate() {
            // SAFETY: a block has `width * NC` values and a panel `width * NV * LANES`; scores and labels have
            // `NV * LANES` entries a panel.
            unsafe {
                let scores = tile::<S, NV, NC>(rows.as_ptr(), centers.as_ptr(), half_norms.as_ptr(), width);
                for v in 0..NV {
                    let at = (panel * NV + v) * S::LANES;
                    let mut low = Lowest::<S>::load::<SECOND>(labels, best, second, at);
                    for j in 0..NC {
                        low.update::<SECOND>(scores[j][v], S::splat(f32::from_bits(names[j])));
                    }
                    low.store::<SECOND>(labels, best, second, at);
                }
            }
        }
    }
}

/// Scores of `NV` vectors of rows and `NC` centres, all in registers.
#[inline(always)]
unsafe fn tile<S: Simd, const NV: usize, const NC: usize>(
    rows: *const f32,
    centers: *const f32,
    half_norms: *const f32,
    width: usize,
) -> [[S; NV]; NC] {
    // SAFETY: the caller's pointers have `width` columns.
    unsafe {
        let mut scores = [[S::splat(0.0); NV]; NC];
        for j in 0..NC {
            scores[j] = [S::splat(*half_norms.add(j)); NV];
        }
        for t in 0..width {
            let mut x = [S::splat(0.0); NV];
            for v in 0..NV {
                x[v] = S::load(rows.add((t * NV + v) * S::LANES));
            }
            for j in 0..NC {
                let c = S::splat(*centers.add(t * NC + j));
                for v in 0..NV {
                    scores[j][v] = x[v].fnma(c, scores[j][v]);
                }
            }
        }
        scores
    }
}

/// Products of `NR` rows and `NV` vectors of centres at a time. `SQUARES`: squared distances instead.
#[inline(always)]
pub(super) unsafe fn products<S: Simd, const NV: usize, const NR: usize, const SQUARES: bool>(
    task: &Products,
    out: &mut [f32],
) {
    let lanes = NV * S::LANES;
    check::products(task, out, lanes);
    for first in (0..task.rows).step_by(NR) {
        // Past the last row its values are computed again and not written.
        let starts: [*const f32; NR] =
            std::array::from_fn(|r| task.x[(first + r).min(task.rows - 1) * task.stride..].as_ptr());
        let rows = NR.min(task.rows - first);
        for (panel, centers) in task.centers.chunks_exact(lanes * task.width).enumerate() {
            // SAFETY: each start is followed by `width` values, a panel has `width * lanes`.
            let sums = unsafe { product_tile::<S, NV, NR, SQUARES>(&starts, centers.as_ptr(), task.width) };
            let columns = lanes.min(task.count - panel * lanes);
            for r in 0..NR {
                if r < rows {
                    let out = &mut out[(first + r) * task.count + panel * lanes..][..columns];
                    // SAFETY: the instruction set is the caller's.
                    unsafe { store_row(sums[r], out) };
                }
            }
        }
    }
}

/// Writes the first `out.len()` values of `NV` vectors.
#[inline(always)]
unsafe fn store_row<S: Simd, const NV: usize>(sums: [S; NV], out: &mut [f32]) {
    if out.len() == NV * S::LANES {
        for v in 0..NV {
            // SAFETY: `out` holds `NV` vectors.
            unsafe { sums[v].store(out.as_mut_ptr().add(v * S::LANES)) };
        }
        return;
    }
    for (v, out) in out.chunks_mut(S::LANES).enumerate() {
        let mut values = [0.0; 16];
        assert!(S::LANES <= values.len());
        // SAFETY: a vector fits `values`.
        unsafe { sums[v].store(values.as_mut_ptr()) };
        out.copy_from_slice(&values[..out.len()]);
    }
}

#[inline(always)]
unsafe fn product_tile<S: Simd, const NV: usize, const NR: usize, const SQUARES: bool>(
    rows: &[*const f32; NR],
    centers: *const f32,
    width: usize,
) -> [[S; NV]; NR] {
    // SAFETY: the caller's pointers have `width` columns.
    unsafe {
        let mut sums = [[S::splat(0.0); NV]; NR];
        for t in 0..width {
            let mut c = [S::splat(0.0); NV];
            for v in 0..NV {
                c[v] = S::load(centers.add((t * NV + v) * S::LANES));
            }
            for r in 0..NR {
                let x = S::splat(*rows[r].add(t));
                for v in 0..NV {
                    let (a, b) = if SQUARES { (x.sub(c[v]), x.sub(c[v])) } else { (x, c[v]) };
                    sums[r][v] = a.fma(b, sums[r][v]);
                }
            }
        }
        sums
    }
}

/// Combines two slices value by value: whole vectors with the first expression, the rest with the second.
macro_rules! zip {
    ($name:ident($($weight:ident: f32)?), |$old:ident, $new:ident| $vector:expr, $one:expr) => {
        #[inline(always)]
        pub(super) unsafe fn $name<S: Simd>(out: &mut [f32], x: &[f32] $(, $weight: f32)?) {
            check::pair(out, x);
            let whole = out.len() - out.len() % S::LANES;
            for t in (0..whole).step_by(S::LANES) {
                // SAFETY: both slices have `LANES` values from `t`.
                unsafe {
                    let ($old, $new) = (S::load(out.as_ptr().add(t)), S::load(x.as_ptr().add(t)));
                    $vector.store(out.as_mut_ptr().add(t));
                }
            }
            for t in whole..out.len() {
                let ($old, $new) = (out[t], x[t]);
                out[t] = $one;
            }
        }
    };
}

zip!(axpy(weight: f32), |old, new| S::splat(weight).fma(new, old), weight.mul_add(new, old));
zip!(add(), |old, new| old.add(new), old + new);
zip!(max_into(), |old, new| new.max(old), if new > old { new } else { old });
