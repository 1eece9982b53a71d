//! What the processor can do: fused multiply-adds from registers alone. Prints operations in a second, two for each
//! multiply-add, of as many threads as the first argument says, on the path that `VQRS_SIMD` names or the fastest.

use std::sync::Barrier;
use std::time::Instant;
use vqrs_core::kernels::{self, PEAK_FMAS};

/// Multiply-adds of one measurement: well under a millisecond, so that some are not interrupted.
const ROUNDS: usize = 4_000;

/// The fastest of a hundred short measurements.
fn fastest() -> f64 {
    let rate = || {
        let begin = Instant::now();
        std::hint::black_box((kernels::best().fma_peak)(ROUNDS));
        (2 * ROUNDS * PEAK_FMAS) as f64 / begin.elapsed().as_secs_f64()
    };
    (0..100).map(|_| rate()).fold(0.0, f64::max)
}

fn main() {
    let threads: usize = std::env::args().nth(1).map_or(1, |text| text.parse().expect("a number of threads"));
    let together = Barrier::new(threads);
    let run = || {
        together.wait();
        fastest()
    };
    let rates: Vec<f64> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        running.into_iter().map(|thread| thread.join().expect("a rate")).collect()
    });
    println!("{}", rates.iter().sum::<f64>());
}
