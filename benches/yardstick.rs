//! What the processor can do, and what the assignment of k-means makes of it.
//!
//! `yardstick THREADS CENTRES COLUMNS` prints two rates, floating point operations in a second of all threads: of fused
//! multiply-adds from registers alone, and of labels for rows of that shape. Both are medians of short windows, taken in
//! turn, on the path that `VQRS_SIMD` names or the fastest.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;
use vqrs_core::algo::nearest::{Centroids, Columns};
use vqrs_core::kernels::{self, PEAK_FMAS};
use vqrs_core::rng::Rng;

/// Windows of each kind.
const WINDOWS: usize = 31;

/// Calls of the yardstick's kernel in a window: well under a millisecond.
const ROUNDS: usize = 8_000;

fn normal(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.normal() as f32).collect()
}

/// Operations in a second of one piece of work.
fn rate(operations: usize, work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    operations as f64 / begin.elapsed().as_secs_f64()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Both rates of one thread. Every window has rows of its own.
fn measure(count: usize, width: usize, together: &Barrier) -> [f64; 2] {
    let mut rng = Rng::new(1);
    // As many rows as the library takes at a time.
    let rows = ((1 << 28) / (count * width)).clamp(64, 2048) / 64 * 64;
    let x = normal(&mut rng, rows * width * WINDOWS);
    let centroids = Centroids::new(&normal(&mut rng, count * width), width);
    let mut labels = vec![0; rows];
    together.wait();
    let (mut peaks, mut assignments) = (Vec::new(), Vec::new());
    for x in x.chunks_exact(rows * width) {
        peaks.push(rate(2 * ROUNDS * PEAK_FMAS, || {
            black_box((kernels::best().fma_peak)(ROUNDS));
        }));
        let block = Columns::contiguous(x, width);
        assignments.push(rate(2 * rows * count * width, || centroids.nearest_block(block, &mut labels, None)));
    }
    [median(peaks), median(assignments)]
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let [threads, count, width] = numbers[..] else {
        panic!("expected three numbers: threads, centres, columns");
    };
    let together = Barrier::new(threads);
    let rates: Vec<[f64; 2]> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(|| measure(count, width, &together))).collect();
        running.into_iter().map(|thread| thread.join().expect("two rates")).collect()
    });
    for kind in 0..2 {
        println!("{}", rates.iter().map(|pair| pair[kind]).sum::<f64>());
    }
}
