//! AVX2 and AVX-512: the vector operations, and the functions that switch them on for a whole loop.

mod pack;
mod sift;
mod vectors;

use super::scalar;
use super::simd;
use super::{
    Bags, BooksView, Descent, Extension, Grids, Kernels, LevelsView, Output, Panels, Products, Rows, Sweep, TrellisView,
};
use pack::pack;
use vectors::{Eight, Sixteen};

/// The tables that this CPU can run.
pub(super) fn available() -> Vec<&'static Kernels> {
    let mut all = Vec::new();
    let eight = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    if eight && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("popcnt") {
        all.push(&AVX2);
        let wide = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
        if wide && is_x86_feature_detected!("avx512f") {
            all.push(&AVX512);
            if is_x86_feature_detected!("avx512bf16") {
                all.push(&AVX512_BF16);
            }
        }
    }
    all
}

/// 12 sums of 16 registers. One vector of rows more would not leave room for the centre.
static AVX2: Kernels = Kernels {
    name: "avx2",
    panel_rows: 8,
    block_centers: 6,
    panel_centers: 16,
    lookup_books: avx2_lookup_books,
    lookup_levels: avx2_lookup_levels,
    pool_books: avx2_pool_books,
    pool_levels: avx2_pool_levels,
    pack: pack::<8>,
    nearest: avx2_nearest,
    sift: None,
    dots: avx2_dots,
    distances: avx2_distances,
    extend: avx2_extend,
    decode_trellis: avx2_decode_trellis,
    sweep: avx2_sweep,
    hadamard: avx2_hadamard,
    descend: avx2_descend,
    quantize: avx2_quantize,
    grid_error: avx2_grid_error,
    axpy,
    to_f16: avx2_to_f16,
    to_bf16: avx2_to_bf16,
    carries,
    fma_peak: avx2_fma_peak,
};

/// 24 sums of 32 registers.
static AVX512: Kernels = Kernels {
    name: "avx512",
    panel_rows: 16,
    block_centers: 8,
    panel_centers: 32,
    lookup_books: avx512_lookup_books,
    lookup_levels: avx512_lookup_levels,
    pool_books: avx512_pool_books,
    pool_levels: avx512_pool_levels,
    pack: pack::<16>,
    nearest: avx512_nearest,
    sift: None,
    dots: avx512_dots,
    distances: avx512_distances,
    extend: avx512_extend,
    decode_trellis: avx512_decode_trellis,
    sweep: avx512_sweep,
    hadamard: avx512_hadamard,
    descend: avx512_descend,
    quantize: avx512_quantize,
    grid_error: avx512_grid_error,
    axpy,
    to_f16: avx512_to_f16,
    to_bf16: avx512_to_bf16,
    carries,
    fma_peak: avx512_fma_peak,
};

/// [`AVX512`], and products of bfloat16.
static AVX512_BF16: Kernels = Kernels { name: "avx512bf16", sift: Some(sift::sift), ..AVX512 };

/// A safe function around a body that is compiled for more features than the crate.
macro_rules! shell {
    ($features:literal, fn $name:ident($($argument:ident: $type:ty),*) $(-> $out:ty)? = $body:expr) => {
        fn $name($($argument: $type),*) $(-> $out)? {
            #[target_feature(enable = $features)]
            unsafe fn inside($($argument: $type),*) $(-> $out)? {
                // SAFETY: this function has the features of the body's vectors.
                unsafe { $body($($argument),*) }
            }
            // SAFETY: the tables of this file are handed out only where the CPU has the features.
            unsafe { inside($($argument),*) }
        }
    };
}

shell!("avx2,fma,f16c", fn avx2_lookup_books(view: &BooksView, rows: &Rows, out: Output)
    = simd::lookup_books::<Eight>);
shell!("avx2,fma,f16c", fn avx2_lookup_levels(view: &LevelsView, rows: &Rows, out: Output)
    = simd::lookup_levels::<Eight>);
shell!("avx2,fma,f16c", fn avx2_pool_books(view: &BooksView, bags: &Bags, out: &mut [f32])
    = simd::pool_books::<Eight>);
shell!("avx2,fma,f16c", fn avx2_pool_levels(view: &LevelsView, bags: &Bags, out: &mut [f32])
    = simd::pool_levels::<Eight>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_lookup_books(view: &BooksView, rows: &Rows, out: Output)
    = simd::lookup_books::<Sixteen>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_lookup_levels(view: &LevelsView, rows: &Rows, out: Output)
    = simd::lookup_levels::<Sixteen>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_pool_books(view: &BooksView, bags: &Bags, out: &mut [f32])
    = simd::pool_books::<Sixteen>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_pool_levels(view: &LevelsView, bags: &Bags, out: &mut [f32])
    = simd::pool_levels::<Sixteen>);
shell!("avx2,fma,f16c", fn axpy(out: &mut [f32], x: &[f32], weight: f32) = simd::axpy::<Eight>);
shell!("avx2,fma,f16c", fn avx2_nearest(task: &Panels, labels: &mut [u32], best: &mut [f32], second: &mut [f32])
    = simd::nearest::<Eight, 2, 6, 1, 1>);
shell!("avx2,fma,f16c", fn avx2_dots(task: &Products, out: &mut [f32]) = simd::products::<Eight, 2, 6, false>);
shell!("avx2,fma,f16c", fn avx2_distances(task: &Products, out: &mut [f32]) = simd::products::<Eight, 2, 4, true>);
shell!("avx2,fma,f16c,popcnt", fn avx2_extend(task: &Extension, scores: &mut [f32], paths: &mut [u16])
    = simd::extend::<Eight, 8, 2>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c,popcnt",
    fn avx512_extend(task: &Extension, scores: &mut [f32], paths: &mut [u16]) = simd::extend::<Sixteen, 8, 1>);
shell!("avx2,fma,f16c", fn avx2_descend(task: &Descent, codes: &mut [u16], scores: &mut [f32])
    = simd::descend::<Eight, 4>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c",
    fn avx512_descend(task: &Descent, codes: &mut [u16], scores: &mut [f32]) = simd::descend::<Sixteen, 8>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c",
    fn avx512_nearest(task: &Panels, labels: &mut [u32], best: &mut [f32], second: &mut [f32])
    = simd::nearest::<Sixteen, 3, 8, 4, 2>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_dots(task: &Products, out: &mut [f32])
    = simd::products::<Sixteen, 2, 12, false>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_distances(task: &Products, out: &mut [f32])
    = simd::products::<Sixteen, 2, 12, true>);
shell!("avx2,fma,f16c", fn avx2_decode_trellis(view: &TrellisView, rows: &Rows, out: &mut [f32])
    = simd::decode_trellis::<Eight>);
shell!("avx2,fma,f16c", fn avx2_sweep(task: &Sweep, costs: &mut [f32], least: &mut [f32], back: &mut [u8])
    = simd::sweep::<Eight>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c",
    fn avx512_decode_trellis(view: &TrellisView, rows: &Rows, out: &mut [f32]) = simd::decode_trellis::<Sixteen>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c",
    fn avx512_sweep(task: &Sweep, costs: &mut [f32], least: &mut [f32], back: &mut [u8]) = simd::sweep::<Sixteen>);
shell!("avx2,fma,f16c", fn avx2_fma_peak(rounds: usize) -> f32 = simd::fma_peak::<Eight, 12>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_fma_peak(rounds: usize) -> f32
    = simd::fma_peak::<Sixteen, 12>);

shell!("avx2,fma,f16c", fn avx2_to_f16(x: &[f32], out: &mut [u16]) = simd::to_f16::<Eight>);
shell!("avx2,fma,f16c", fn avx2_to_bf16(x: &[f32], out: &mut [u16]) = simd::to_bf16::<Eight>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_to_f16(x: &[f32], out: &mut [u16]) = simd::to_f16::<Sixteen>);
shell!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", fn avx512_to_bf16(x: &[f32], out: &mut [u16]) = simd::to_bf16::<Sixteen>);

fn carries(words: &[u32], mask: u32, one: u32) -> u32 {
    #[target_feature(enable = "avx2")]
    fn inside(words: &[u32], mask: u32, one: u32) -> u32 {
        scalar::carries(words, mask, one)
    }
    // SAFETY: the tables of this file are handed out only where the CPU has the feature.
    unsafe { inside(words, mask, one) }
}

/// The plain loops of scalar quantization and of rotations, which the compiler turns into vectors of these features.
macro_rules! plain {
    ($features:literal, $quantize:ident, $grid_error:ident, $hadamard:ident) => {
        fn $hadamard(values: &mut [f32], factor: f32) {
            #[target_feature(enable = $features)]
            fn inside(values: &mut [f32], factor: f32) {
                scalar::hadamard(values, factor);
            }
            // SAFETY: the tables of this file are handed out only where the CPU has the features.
            unsafe { inside(values, factor) }
        }
        fn $quantize(values: &[f32], grids: &Grids, levels: &mut [u8]) {
            #[target_feature(enable = $features)]
            fn inside(values: &[f32], grids: &Grids, levels: &mut [u8]) {
                scalar::quantize(values, grids, levels);
            }
            // SAFETY: the tables of this file are handed out only where the CPU has the features.
            unsafe { inside(values, grids, levels) }
        }
        fn $grid_error(values: &[f32], step: f32, low: f32, top: f32) -> f32 {
            #[target_feature(enable = $features)]
            fn inside(values: &[f32], step: f32, low: f32, top: f32) -> f32 {
                scalar::grid_error(values, step, low, top)
            }
            // SAFETY: the tables of this file are handed out only where the CPU has the features.
            unsafe { inside(values, step, low, top) }
        }
    };
}

plain!("avx2", avx2_quantize, avx2_grid_error, avx2_hadamard);
plain!("avx512f,avx512bw,avx512vl,avx2", avx512_quantize, avx512_grid_error, avx512_hadamard);
