//! Rows that are sums or joins of codebook entries.

use super::{bits, check, row_codes, BooksView, Ids, Values, Widen};

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
pub(in crate::kernels) unsafe fn lookup_books<S: Widen>(view: &BooksView, codes: &[u8], ids: Ids, out: &mut [f32]) {
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
