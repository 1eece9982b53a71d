//! Rows that are sums or joins of codebook entries.

use super::rows::{Bf16, Decode, Job, Lookup, Pool, Reader, Source, F16};
use super::{check, joined, scalar, Bags, BooksView, Entries, Output, Rows, Simd, Values, Widen};
use std::marker::PhantomData;

/// Type of the values of a codebook.
trait Entry: Copy {
    /// Each book has a scale of its own.
    const SCALED: bool = false;
    unsafe fn load<S: Widen>(from: *const Self) -> S;
    /// As [`Entry::load`], from entries of `WIDTH` values each: 2, 4 or 8, and fewer than `LANES`.
    #[inline(always)]
    unsafe fn join<S: Widen, const WIDTH: usize>(entries: &Entries<Self>) -> S {
        // SAFETY: passed on to the caller.
        unsafe { Self::load::<S>(joined::<Self, WIDTH>(S::LANES, entries).as_ptr().cast()) }
    }
    unsafe fn one<S: Widen>(self) -> f32;
    /// Whether all values times this scale are numbers of single precision, without rounding.
    fn exact(scale: f32) -> bool {
        scale == 1.0
    }
}

/// Whether a scale has no bits below the highest `bits` of its mantissa, and is far from the ends of single precision.
fn short(scale: f32, bits: u32) -> bool {
    (1e-30..1e30).contains(&scale) && scale.to_bits() << (9 + bits) == 0
}

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
    unsafe fn join<S: Widen, const WIDTH: usize>(entries: &Entries<F16>) -> S {
        // SAFETY: passed on to the caller; `F16` is a transparent `u16`.
        unsafe { S::join_f16::<WIDTH>(&*std::ptr::from_ref(entries).cast()) }
    }
    #[inline(always)]
    unsafe fn one<S: Widen>(self) -> f32 {
        // SAFETY: passed on to the caller.
        unsafe { S::one_f16(self.0) }
    }
    fn exact(scale: f32) -> bool {
        short(scale, 0)
    }
}

impl Entry for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Widen>(from: *const Bf16) -> S {
        // SAFETY: passed on to the caller; `Bf16` is a transparent `u16`.
        unsafe { S::load_bf16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn join<S: Widen, const WIDTH: usize>(entries: &Entries<Bf16>) -> S {
        // SAFETY: passed on to the caller; `Bf16` is a transparent `u16`.
        unsafe { S::join_bf16::<WIDTH>(&*std::ptr::from_ref(entries).cast()) }
    }
    #[inline(always)]
    unsafe fn one<S: Widen>(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

impl Entry for i8 {
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn load<S: Widen>(from: *const i8) -> S {
        // SAFETY: passed on to the caller.
        unsafe { S::load_i8(from) }
    }
    #[inline(always)]
    unsafe fn one<S: Widen>(self) -> f32 {
        f32::from(self)
    }
    fn exact(scale: f32) -> bool {
        // Seven bits of the integer and one before the mantissa's.
        short(scale, 16)
    }
}

#[inline(always)]
pub(in crate::kernels) unsafe fn lookup_books<S: Widen>(view: &BooksView, rows: &Rows, out: Output) {
    check::books(view, rows, &out);
    // SAFETY: the view was checked; the instruction set is the caller's.
    unsafe {
        match out {
            Output::F32(out) => run::<S>(view, Lookup::<f32> { rows, out }),
            Output::F16(out) => run::<S>(view, Lookup::<F16> { rows, out }),
            Output::Bf16(out) => run::<S>(view, Lookup::<Bf16> { rows, out }),
        }
    }
}

#[inline(always)]
pub(in crate::kernels) unsafe fn pool_books<S: Widen>(view: &BooksView, bags: &Bags, out: &mut [f32]) {
    check::pool_books(view, bags, out);
    // SAFETY: the view was checked; the instruction set is the caller's.
    unsafe { run::<S>(view, Pool { bags, out }) }
}

#[inline(always)]
unsafe fn run<S: Widen>(view: &BooksView, job: impl Job) {
    let all = |wanted: fn(&Values) -> bool| view.groups.iter().all(|group| wanted(&group.entries));
    // SAFETY: the view was checked, and the type of its entries is matched; the instruction set is the caller's.
    unsafe {
        match view.groups.first().map(|group| group.entries) {
            Some(Values::F16(_)) if all(|entries| matches!(entries, Values::F16(_))) => match view.bits {
                4 => run_typed::<S, F16, 4>(view, job),
                8 => run_typed::<S, F16, 8>(view, job),
                _ => run_typed::<S, F16, 0>(view, job),
            },
            Some(Values::Bf16(_)) if all(|entries| matches!(entries, Values::Bf16(_))) => match view.bits {
                4 => run_typed::<S, Bf16, 4>(view, job),
                8 => run_typed::<S, Bf16, 8>(view, job),
                _ => run_typed::<S, Bf16, 0>(view, job),
            },
            Some(Values::F32(_)) if all(|entries| matches!(entries, Values::F32(_))) => match view.bits {
                8 => run_typed::<S, f32, 8>(view, job),
                _ => run_typed::<S, f32, 0>(view, job),
            },
            Some(Values::I8(_)) => match view.bits {
                8 => run_typed::<S, i8, 8>(view, job),
                _ => run_typed::<S, i8, 0>(view, job),
            },
            _ => job.rows::<S>(&Mixed(view), view.dim),
        }
    }
}

#[inline(always)]
unsafe fn run_typed<S: Widen, E: Entry, const BITS: u32>(view: &BooksView, job: impl Job) {
    let (first, dim, row_bytes) = (&view.groups[0], view.dim, view.row_bytes);
    let (width, alone) = (first.width, view.groups.len() == 1);
    let books = Books::<E, BITS> {
        first: first_entry(first.entries),
        width,
        bits: view.bits,
        scale: view.scale,
        scales: view.scales.as_ptr(),
    };
    // SAFETY: a reader is chosen for the places and the widths of the books that it is made for.
    unsafe {
        if alone && dim >= S::LANES && first.starts.iter().all(|start| *start == 0) && width == dim && !view.tiled {
            return job.run::<S>(&Sum { books, count: first.starts.len() }, row_bytes, dim);
        }
        let mut at = 0;
        let in_order = view.groups.iter().all(|group| {
            group.starts.iter().all(|start| {
                at += group.width;
                *start == at - group.width
            })
        });
        if !(view.tiled && in_order && at == dim) {
            return job.rows::<S>(&Any::<S, E, BITS> { view, types: PhantomData }, dim);
        }
        // The scale of each column.
        let columns: Vec<f32> = match E::SCALED {
            true => {
                let mut scales = view.scales.iter();
                let groups = view.groups.iter().flat_map(|group| group.starts.iter().map(|_| group.width));
                groups.flat_map(|width| std::iter::repeat_n(scales.next().copied().unwrap_or(1.0), width)).collect()
            }
            false => Vec::new(),
        };
        let columns = columns.as_slice();
        let exact = if E::SCALED { columns.iter().all(|scale| E::exact(*scale)) } else { E::exact(view.scale) };
        match width {
            2 if alone && dim >= S::LANES => {
                job.run::<S>(&Tiles::<E, 2, BITS> { books, columns, exact }, row_bytes, dim)
            }
            4 if alone && dim >= S::LANES => {
                job.run::<S>(&Tiles::<E, 4, BITS> { books, columns, exact }, row_bytes, dim)
            }
            8 if alone && dim >= S::LANES => {
                job.run::<S>(&Tiles::<E, 8, BITS> { books, columns, exact }, row_bytes, dim)
            }
            16 if alone && dim >= S::LANES => {
                job.run::<S>(&Tiles::<E, 16, BITS> { books, columns, exact }, row_bytes, dim)
            }
            _ if view.groups.iter().all(|group| group.width >= S::LANES) => {
                let (books, vectors) = parts::<S, E, BITS>(view);
                job.run::<S>(&Parts { books: &books, vectors: &vectors }, row_bytes, dim)
            }
            _ if view.groups.iter().all(|group| group.width >= S::Half::LANES) => {
                let (books, vectors) = parts::<S::Half, E, BITS>(view);
                job.run::<S::Half>(&Parts { books: &books, vectors: &vectors }, row_bytes, dim)
            }
            _ => job.rows::<S>(&Gather::<S, E, BITS> { view, columns, types: PhantomData }, dim),
        }
    }
}

fn first_entry<T>(values: Values) -> *const T {
    match values {
        Values::F32(values) => values.as_ptr().cast(),
        Values::F16(values) | Values::Bf16(values) => values.as_ptr().cast(),
        Values::I8(values) => values.as_ptr().cast(),
    }
}

/// Code `index` of a row. `BITS`: 4 or 8 if that is known, else 0. Reads up to four bytes behind the row.
#[inline(always)]
unsafe fn code<const BITS: u32>(row: *const u8, bits: u32, index: usize) -> usize {
    // SAFETY: the row has a code `index`, and [`super::rows::SPARE`] bytes follow it.
    unsafe {
        // Volatile, or the compiler collects codes in a vector to compute addresses there, and takes them out again.
        match BITS {
            8 => row.add(index).read_volatile() as usize,
            4 => (row.add(index / 2).read_volatile() as usize >> (index % 2 * 4)) & 15,
            _ => {
                let place = index * bits as usize;
                let bytes = row.add(place / 8).cast::<[u8; 4]>().read_volatile();
                ((u32::from_le_bytes(bytes) >> (place % 8)) & ((1 << bits) - 1)) as usize
            }
        }
    }
}

/// Books of one width, one after the other.
#[derive(Clone, Copy)]
struct Books<E, const BITS: u32> {
    first: *const E,
    width: usize,
    bits: u32,
    scale: f32,
    /// One for each book, where they have their own.
    scales: *const f32,
}

impl<E: Entry, const BITS: u32> Books<E, BITS> {
    /// What entries of book `m` are multiplied by.
    #[inline(always)]
    unsafe fn scale(&self, m: usize) -> f32 {
        match E::SCALED {
            // SAFETY: there is a scale for each book.
            true => unsafe { *self.scales.add(m) },
            false => self.scale,
        }
    }

    /// Bits of a code.
    #[inline(always)]
    fn bits(&self) -> u32 {
        if BITS == 0 {
            self.bits
        } else {
            BITS
        }
    }

    /// The first entry of book `m`.
    #[inline(always)]
    unsafe fn book(&self, m: usize, width: usize) -> *const E {
        // SAFETY: there are as many books, each of 2^bits entries.
        unsafe { self.first.add((m << self.bits()) * width) }
    }

    /// The entry of book `m` that a row picks.
    #[inline(always)]
    unsafe fn entry(&self, row: *const u8, m: usize, width: usize) -> *const E {
        // SAFETY: the row has a code for each book, which is below 2^bits, the number of entries.
        unsafe { self.book(m, width).add(code::<BITS>(row, self.bits, m) * width) }
    }
}

/// Books side by side whose width is a power of two: narrow entries are joined into whole vectors.
#[derive(Clone, Copy)]
struct Tiles<'a, E, const WIDTH: usize, const BITS: u32> {
    books: Books<E, BITS>,
    /// The scale of each column, where books have their own.
    columns: &'a [f32],
    /// Entries times scales need no rounding, so that adding them with [`Simd::fma`] gives the same bits.
    exact: bool,
}

impl<E: Entry, const WIDTH: usize, const BITS: u32> Tiles<'_, E, WIDTH, BITS> {
    /// The same from the first book of `N` vectors on, and the codes from there: all addresses then differ by constants.
    #[inline(always)]
    unsafe fn from<S: Widen, const N: usize>(&self, row: *const u8, vector: usize) -> (Self, *const u8, usize) {
        let beside = S::LANES / WIDTH;
        if N == 1 || beside == 0 || BITS == 0 || !(N * beside * BITS as usize).is_multiple_of(8) {
            return (*self, row, vector * S::LANES);
        }
        let first = vector * beside;
        // SAFETY: the row has the codes and the view the books.
        unsafe {
            let books = Books { first: self.books.book(first, WIDTH), ..self.books };
            (Tiles { books, ..*self }, row.add(first * BITS as usize / 8), 0)
        }
    }

    /// The entries at columns `t` to `t + LANES` of a row.
    #[inline(always)]
    unsafe fn entries<S: Widen>(&self, row: *const u8, t: usize) -> S {
        let first = t / WIDTH;
        // SAFETY: the row has the columns, and `t` is a multiple of the lesser of width and lanes; [`super::rows::SPARE`]
        // bytes follow the row.
        unsafe {
            if WIDTH >= S::LANES {
                return E::load::<S>(self.books.entry(row, first, WIDTH).add(t % WIDTH));
            }
            let mut entries = [std::ptr::null(); 8];
            // One load for all codes of a vector: those of entries are what limits the loop. They are at most 64 bits, and
            // less where they start inside a byte.
            let start = first * BITS as usize;
            let word = u64::from_le(row.add(start / 8).cast::<u64>().read_unaligned()) >> (start % 8);
            for place in 0..S::LANES / WIDTH {
                entries[place] = match BITS {
                    0 => self.books.entry(row, first + place, WIDTH),
                    _ => {
                        let code = (word >> (BITS as usize * place)) as usize & ((1 << BITS) - 1);
                        self.books.book(first + place, WIDTH).add(code * WIDTH)
                    }
                };
            }
            E::join::<S, WIDTH>(&entries)
        }
    }

    /// What the entries from column `t` on are multiplied by.
    #[inline(always)]
    unsafe fn scale<S: Widen>(&self, t: usize) -> S {
        // SAFETY: the row has the columns, each with a scale where books have their own.
        unsafe {
            match E::SCALED {
                true => S::load(self.columns.as_ptr().add(t)),
                false => S::splat(self.books.scale),
            }
        }
    }
}

impl<S: Widen, E: Entry, const WIDTH: usize, const BITS: u32> Reader<S> for Tiles<'_, E, WIDTH, BITS> {
    #[inline(always)]
    unsafe fn read<const N: usize>(&self, row: *const u8, vector: usize, dim: usize) -> [S; N] {
        // SAFETY: the vectors are inside the row.
        unsafe {
            let start = <Self as Reader<S>>::column::<N>(self, vector, dim);
            let (tiles, codes, first) = self.from::<S, N>(row, vector);
            let first = if N > 1 { first } else { start };
            let mut values = [S::splat(0.0); N];
            for i in 0..N {
                let scale = self.scale::<S>(start + i * S::LANES);
                values[i] = tiles.entries::<S>(codes, first + i * S::LANES).mul(scale);
            }
            values
        }
    }

    #[inline(always)]
    unsafe fn add<const N: usize>(&self, row: *const u8, vector: usize, dim: usize, mut sums: [S; N]) -> [S; N] {
        // SAFETY: the vectors are inside the row.
        unsafe {
            if !self.exact {
                let values: [S; N] = self.read::<N>(row, vector, dim);
                for i in 0..N {
                    sums[i] = values[i].add(sums[i]);
                }
                return sums;
            }
            let start = <Self as Reader<S>>::column::<N>(self, vector, dim);
            let (tiles, codes, first) = self.from::<S, N>(row, vector);
            let first = if N > 1 { first } else { start };
            for i in 0..N {
                let scale = self.scale::<S>(start + i * S::LANES);
                sums[i] = tiles.entries::<S>(codes, first + i * S::LANES).fma(scale, sums[i]);
            }
            sums
        }
    }
}

/// Books side by side, each at least as wide as a vector.
#[derive(Clone, Copy)]
struct Parts<'a, E, const BITS: u32> {
    books: &'a [Books<E, BITS>],
    vectors: &'a [Part],
}

/// Where a vector of [`Parts`] comes from.
struct Part {
    column: u32,
    group: u32,
    book: u32,
    /// The place in the entry.
    place: u32,
}

/// What [`Parts`] has, for vectors of `S`.
fn parts<S: Widen, E: Entry, const BITS: u32>(view: &BooksView) -> (Vec<Books<E, BITS>>, Vec<Part>) {
    let (mut books, mut vectors, mut m) = (Vec::new(), Vec::new(), 0);
    for (index, group) in view.groups.iter().enumerate() {
        // Book `m` of the row is book `m - before` of the group.
        let before = m << view.bits;
        let first = first_entry::<E>(group.entries).wrapping_sub(before * group.width);
        let scales = view.scales.as_ptr();
        books.push(Books { first, width: group.width, bits: view.bits, scale: view.scale, scales });
        for start in group.starts {
            for t in (0..group.width).step_by(S::LANES) {
                let t = t.min(group.width - S::LANES);
                let (column, place) = ((start + t) as u32, t as u32);
                vectors.push(Part { column, group: index as u32, book: m as u32, place });
            }
            m += 1;
        }
    }
    (books, vectors)
}

impl<S: Widen, E: Entry, const BITS: u32> Reader<S> for Parts<'_, E, BITS> {
    #[inline(always)]
    fn vectors(&self, _: usize) -> usize {
        self.vectors.len()
    }

    #[inline(always)]
    fn column<const N: usize>(&self, vector: usize, _: usize) -> usize {
        self.vectors[vector].column as usize
    }

    #[inline(always)]
    fn place<const N: usize>(&self, vector: usize, i: usize, _: usize) -> usize {
        self.vectors[vector + i].column as usize
    }

    #[inline(always)]
    unsafe fn read<const N: usize>(&self, row: *const u8, vector: usize, _: usize) -> [S; N] {
        // SAFETY: each group has its books, and their entries a vector from `t`.
        unsafe {
            let mut values = [S::splat(0.0); N];
            for i in 0..N {
                let part = &self.vectors[vector + i];
                let (books, m) = (&self.books[part.group as usize], part.book as usize);
                let entry = books.first.wrapping_add((m << books.bits) * books.width);
                let entry = entry.wrapping_add(code::<BITS>(row, books.bits, m) * books.width);
                values[i] = E::load::<S>(entry.add(part.place as usize)).mul(S::splat(books.scale(m)));
            }
            values
        }
    }
}

/// Full rows that are added, the first one stored.
#[derive(Clone, Copy)]
struct Sum<E, const BITS: u32> {
    books: Books<E, BITS>,
    count: usize,
}

impl<S: Widen, E: Entry, const BITS: u32> Reader<S> for Sum<E, BITS> {
    #[inline(always)]
    unsafe fn read<const N: usize>(&self, row: *const u8, vector: usize, dim: usize) -> [S; N] {
        // SAFETY: all books are as wide as the row, which has the columns.
        unsafe {
            let t = <Self as Reader<S>>::column::<N>(self, vector, dim);
            let scale = S::splat(self.books.scale(0));
            let mut sums = [scale; N];
            let first = self.books.entry(row, 0, dim);
            for i in 0..N {
                // A stored -0 must not become 0 + -0 = 0.
                sums[i] = E::load::<S>(first.add(t + i * S::LANES)).mul(scale);
            }
            for m in 1..self.count {
                let entry = self.books.entry(row, m, dim);
                let scale = S::splat(self.books.scale(m));
                for i in 0..N {
                    sums[i] = E::load::<S>(entry.add(t + i * S::LANES)).fma(scale, sums[i]);
                }
            }
            sums
        }
    }
}

/// Books of more than one type: rare enough for the plain loop.
struct Mixed<'a>(&'a BooksView<'a>);

impl Decode for Mixed<'_> {
    #[inline(always)]
    unsafe fn decode(&self, rows: &Rows, out: &mut [f32]) {
        scalar::decode_books(self.0, rows, out);
    }
}

/// Books in any places, one after the other.
struct Any<'a, S, E, const BITS: u32> {
    view: &'a BooksView<'a>,
    types: PhantomData<(S, E)>,
}

impl<S: Widen, E: Entry, const BITS: u32> Decode for Any<'_, S, E, BITS> {
    #[inline(always)]
    unsafe fn decode(&self, rows: &Rows, out: &mut [f32]) {
        let view = self.view;
        let mut out = out.chunks_exact_mut(view.dim);
        let mut source = Source::new::<S>(rows, view.row_bytes);
        while let Some(row) = source.next::<S>() {
            let Some(out) = out.next() else { break };
            if !view.stores_first() {
                out.fill(0.0);
            }
            let mut m = 0;
            for group in &view.groups {
                let entries = first_entry::<E>(group.entries);
                for (book, start) in group.starts.iter().enumerate() {
                    let store = view.tiled || (m == 0 && group.width == view.dim);
                    let out = &mut out[*start..start + group.width];
                    // SAFETY: a code is below 2^bits and the book has `width << bits` values.
                    unsafe {
                        let entry = (book << view.bits) + code::<BITS>(row, view.bits, m);
                        place::<S, E>(entries.add(entry * group.width), view.scale_of(m), store, out);
                    }
                    m += 1;
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

/// Puts whole rows whose columns have scales of their own.
#[inline(always)]
unsafe fn place_columns<S: Widen, E: Entry>(values: *const E, columns: &[f32], out: &mut [f32]) {
    let (dim, whole) = (columns.len(), columns.len() - columns.len() % S::LANES);
    for (row, out) in out.chunks_exact_mut(dim).enumerate() {
        // SAFETY: there are as many values as `out` has.
        unsafe {
            let values = values.add(row * dim);
            for t in (0..whole).step_by(S::LANES) {
                let scale = S::load(columns.as_ptr().add(t));
                E::load::<S>(values.add(t)).mul(scale).store(out.as_mut_ptr().add(t));
            }
            for t in whole..dim {
                out[t] = (*values.add(t)).one::<S>() * columns[t];
            }
        }
    }
}

/// Values that [`gather`] collects before it converts them: they stay in the first level cache, and the wide loads come
/// long enough after the narrow stores not to wait for them.
const SCRATCH: usize = 1024;

/// Books side by side, of any widths: the entries of several rows are collected, then converted in one go.
struct Gather<'a, S, E, const BITS: u32> {
    view: &'a BooksView<'a>,
    /// The scale of each column, where books have their own.
    columns: &'a [f32],
    types: PhantomData<(S, E)>,
}

impl<S: Widen, E: Entry, const BITS: u32> Decode for Gather<'_, S, E, BITS> {
    #[inline(always)]
    unsafe fn decode(&self, rows: &Rows, out: &mut [f32]) {
        let view = self.view;
        let step = (SCRATCH / view.dim).max(1) * view.dim;
        let mut scratch = Vec::<E>::with_capacity(step);
        let (mut done, mut filled) = (0, 0);
        let mut source = Source::new::<S>(rows, view.row_bytes);
        while let Some(row) = source.next::<S>() {
            let mut m = 0;
            for group in &view.groups {
                let entries = first_entry::<E>(group.entries);
                // SAFETY: the codes of the group are below 2^bits, which is the number of its entries; they fit the scratch.
                unsafe {
                    let copies = (entries, scratch.as_mut_ptr().add(filled), row, view.bits, m, group.starts.len());
                    match group.width {
                        1 => copy::<E, 1>(copies),
                        2 => copy::<E, 2>(copies),
                        3 => copy::<E, 3>(copies),
                        4 => copy::<E, 4>(copies),
                        5 => copy::<E, 5>(copies),
                        6 => copy::<E, 6>(copies),
                        7 => copy::<E, 7>(copies),
                        8 => copy::<E, 8>(copies),
                        width => {
                            for book in 0..group.starts.len() {
                                let entry = (book << view.bits) + code::<BITS>(row, view.bits, m + book);
                                copies.1.add(book * width).copy_from_nonoverlapping(entries.add(entry * width), width);
                            }
                        }
                    }
                }
                filled += group.width * group.starts.len();
                m += group.starts.len();
            }
            if filled == step || done + filled == out.len() {
                // SAFETY: `filled` values of the scratch were written just now.
                unsafe {
                    match E::SCALED {
                        true => place_columns::<S, E>(scratch.as_ptr(), self.columns, &mut out[done..done + filled]),
                        false => place::<S, E>(scratch.as_ptr(), view.scale, true, &mut out[done..done + filled]),
                    }
                }
                (done, filled) = (done + filled, 0);
            }
        }
    }
}

/// Copies the entries that a row picks from books of one width: books, place, row, bits, first code, number.
#[inline(always)]
unsafe fn copy<E: Entry, const WIDTH: usize>(
    (entries, to, row, bits, m, count): (*const E, *mut E, *const u8, u32, usize, usize),
) {
    let (entries, to) = (entries.cast::<[E; WIDTH]>(), to.cast::<[E; WIDTH]>());
    // As many codes as eight bytes are sure to have, wherever the first one starts.
    let (step, mask) = (if bits <= 8 { 7 } else { 3 }, (1 << bits) - 1);
    for start in (0..count).step_by(step) {
        let place = (m + start) * bits as usize;
        // SAFETY: the row has the first code, and [`super::rows::SPARE`] bytes follow it.
        let mut word = unsafe { u64::from_le(row.add(place / 8).cast::<u64>().read_unaligned()) } >> (place % 8);
        for book in start..count.min(start + step) {
            let entry = (book << bits) + (word & mask) as usize;
            word >>= bits;
            // SAFETY: passed on to the caller.
            unsafe { to.add(book).write(*entries.add(entry)) };
        }
    }
}
