//! Trellis codes: the sweep over all states that finds the best code, and reading rows back.

use super::rows::{Decode, Job, Lookup, Source};
use super::{check, scalar, Rows, Simd, Widen};
use crate::kernels::{Sweep, TrellisView};
use std::marker::PhantomData;

/// Vectors of scores whose origins are kept as bytes.
pub(in crate::kernels) trait Trace: Simd {
    /// The same small integer in all lanes, as bits.
    #[inline(always)]
    unsafe fn mark(number: u32) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { Self::splat(f32::from_bits(number)) }
    }
    /// Writes the lowest byte of each lane.
    unsafe fn store_bytes(self, to: *mut u8);
    /// Numbers from a place on, each `1 << K` times. May read a whole vector.
    unsafe fn repeat<const K: u32>(from: *const f32) -> Self;
}

#[inline(always)]
pub(in crate::kernels) unsafe fn sweep<S: Trace>(task: &Sweep, costs: &mut [f32], least: &mut [f32], back: &mut [u8]) {
    check::sweep(task, costs, least, back);
    let states = 1usize << task.state_bits;
    if states < S::LANES {
        return scalar::sweep(task, costs, least, back);
    }
    let mut from = 0;
    for (number, (step, value)) in task.steps.iter().zip(task.values).enumerate() {
        let heads = states >> step.bits;
        if number == 0 {
            scalar::start(task.start, &mut least[..heads]);
        } else if step.bits > 0 {
            // SAFETY: the task was checked: there are `heads` costs for each of the step's choices, and as many bytes.
            unsafe { merge::<S>(heads, 1 << step.bits, costs, least, &mut back[from..from + heads]) };
        } else {
            least[..states].copy_from_slice(&costs[..states]);
        }
        if step.bits > 0 {
            from += heads;
        }
        let levels = &task.levels[step.table as usize..][..states];
        // SAFETY: the task was checked: `least` has a vector behind its last number, `costs` and levels are whole vectors.
        unsafe {
            match step.bits {
                0 => branch::<S, 0>(levels, *value, step.scale, step.bits, least, costs),
                1 => branch::<S, 1>(levels, *value, step.scale, step.bits, least, costs),
                2 => branch::<S, 2>(levels, *value, step.scale, step.bits, least, costs),
                3 => branch::<S, 3>(levels, *value, step.scale, step.bits, least, costs),
                _ => branch::<S, 4>(levels, *value, step.scale, step.bits, least, costs),
            }
        }
    }
}

/// The cheapest of the `choices` states that lead to each head, and which one it is: the first of equals.
#[inline(always)]
unsafe fn merge<S: Trace>(heads: usize, choices: usize, costs: &[f32], least: &mut [f32], back: &mut [u8]) {
    let whole = heads - heads % S::LANES;
    let (costs_at, least_at, back_at) = (costs.as_ptr(), least.as_mut_ptr(), back.as_mut_ptr());
    for head in (0..whole).step_by(S::LANES) {
        // SAFETY: a vector from each of the places is inside the slices, as the caller says.
        unsafe {
            let mut best = S::load(costs_at.add(head));
            let mut which = S::mark(0);
            for choice in 1..choices {
                let other = S::load(costs_at.add(choice * heads + head));
                which = other.less(best, S::mark(choice as u32), which);
                best = other.min(best);
            }
            best.store(least_at.add(head));
            which.store_bytes(back_at.add(head));
        }
    }
    scalar::merge(whole..heads, heads, costs, least, back);
}

/// The cost of every state: its head's, and the squared error of its level. `K` is the number of bits of the step, or 4
/// for 4 and more.
#[inline(always)]
unsafe fn branch<S: Trace, const K: u32>(
    levels: &[f32],
    value: f32,
    scale: f32,
    bits: u32,
    least: &[f32],
    costs: &mut [f32],
) {
    // SAFETY: as the caller says.
    unsafe {
        let (value, scale) = (S::splat(value), S::splat(scale));
        for state in (0..levels.len()).step_by(S::LANES) {
            let head = least.as_ptr().add(state >> bits);
            let before = match 1 << K >= S::LANES {
                true => S::splat(*head),
                false => S::repeat::<K>(head),
            };
            let error = S::load(levels.as_ptr().add(state)).fnma(scale, value);
            error.fma(error, before).store(costs.as_mut_ptr().add(state));
        }
    }
}

#[inline(always)]
pub(in crate::kernels) unsafe fn decode_trellis<S: Widen>(view: &TrellisView, rows: &Rows, out: &mut [f32]) {
    check::trellis(view, rows, out);
    // SAFETY: the view was checked; the instruction set is the caller's.
    unsafe { Lookup::<f32> { rows, out }.rows::<S>(&Windows::<S> { view, vector: PhantomData }, view.dim) }
}

/// Rows of a view that was checked.
struct Windows<'a, S> {
    view: &'a TrellisView<'a>,
    vector: PhantomData<S>,
}

impl<S: Widen> Decode for Windows<'_, S> {
    #[inline(always)]
    unsafe fn decode(&self, rows: &Rows, out: &mut [f32]) {
        let view = self.view;
        let mut out = out.chunks_exact_mut(view.dim);
        let mut source = Source::new::<S>(rows, view.row_bytes);
        while let Some(code) = source.next::<S>() {
            let Some(out) = out.next() else { break };
            // SAFETY: the view was checked: windows of straight places lie inside the row, whose `SPARE` bytes may be
            // read with it, and every window has its level.
            unsafe {
                windows(view, code, out);
                scale::<S>(view, code, out);
            }
        }
    }
}

/// The bytes from a place on, the first one lowest. Up to three of them may be behind the row.
#[inline(always)]
unsafe fn word(code: *const u8, byte: u32) -> u32 {
    // SAFETY: the caller has the bytes.
    unsafe { u32::from_le(code.add(byte as usize).cast::<u32>().read_unaligned()) }
}

/// The level of each column.
#[inline(always)]
unsafe fn windows(view: &TrellisView, code: *const u8, out: &mut [f32]) {
    let mask = (1u32 << view.state_bits) - 1;
    let (levels, out) = (view.levels.as_ptr(), out.as_mut_ptr());
    let straight = view.places.len() - view.wrapped;
    // SAFETY: as the caller says.
    unsafe {
        for t in 0..straight {
            let place = *view.places.get_unchecked(t);
            let state = word(code, place.byte) >> place.shift & mask;
            *out.add(t) = *levels.add((place.table + state) as usize);
        }
        // The last bits of the stream, and then the first ones.
        let last = view.bits - view.state_bits;
        let ends = word(code, last / 8) >> (last % 8) & mask;
        let around = u64::from(ends) | u64::from(word(code, 0) & mask) << view.state_bits;
        for t in straight..view.places.len() {
            let place = *view.places.get_unchecked(t);
            let state = (around >> place.shift) as u32 & mask;
            *out.add(t) = *levels.add((place.table + state) as usize);
        }
    }
}

/// Levels to values.
#[inline(always)]
unsafe fn scale<S: Widen>(view: &TrellisView, code: *const u8, out: &mut [f32]) {
    // SAFETY: as the caller says.
    let number = unsafe { word(code, view.bits / 8) } >> (view.bits % 8) & ((1 << view.scale_bits) - 1);
    let scale = view.scales[number as usize];
    let whole = out.len() - out.len() % S::LANES;
    for t in (0..whole).step_by(S::LANES) {
        // SAFETY: the row and the columns' scales have a vector from here.
        unsafe {
            let level = S::load(out.as_ptr().add(t));
            level.mul(S::load(view.columns.as_ptr().add(t))).mul(S::splat(scale)).store(out.as_mut_ptr().add(t));
        }
    }
    for t in whole..out.len() {
        out[t] = out[t] * view.columns[t] * scale;
    }
}
