//! One counter-based generator, frozen for ever: the same seed gives the same numbers on every machine and version.
//!
//! SplitMix64 (Steele, Lea and Flood, 2014): the n-th number is a bit mix of `seed + n * GAMMA`, so numbers can be
//! drawn in any order and by any thread.

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64.
#[inline]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One step of the generator from `id ^ seed`: the hash of ids.
#[inline]
pub fn hash(id: u64, seed: u64) -> u64 {
    mix((id ^ seed).wrapping_add(GAMMA))
}

/// A stream of numbers.
#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    counter: u64,
}

impl Rng {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Rng { seed, counter: 0 }
    }

    /// Another stream of the same seed: independent of this one and of other numbers' streams.
    pub fn stream(&self, number: u64) -> Self {
        Rng::new(mix(self.seed ^ mix(number.wrapping_add(GAMMA))))
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(1);
        mix(self.seed.wrapping_add(self.counter.wrapping_mul(GAMMA)))
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in 0..n by multiply-high; `n` must be positive.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// `count` different numbers of 0..n in increasing order (all of them if `count >= n`).
    pub fn sample(&mut self, n: usize, count: usize) -> Vec<usize> {
        if count >= n {
            return (0..n).collect();
        }
        // Floyd's algorithm: `count` draws, whatever n is.
        let mut chosen = std::collections::BTreeSet::new();
        for last in n - count..n {
            let drawn = self.below(last + 1);
            if !chosen.insert(drawn) {
                chosen.insert(last);
            }
        }
        chosen.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frozen() {
        let mut rng = Rng::new(42);
        let first: Vec<u64> = (0..3).map(|_| rng.next_u64()).collect();
        // SplitMix64's published sequence for seed 42.
        assert_eq!(first, [13679457532755275413, 2949826092126892291, 5139283748462763858]);
        assert_eq!(Rng::new(7).stream(1).next_u64(), Rng::new(7).stream(1).next_u64());
        assert_ne!(Rng::new(7).stream(1).next_u64(), Rng::new(7).stream(2).next_u64());
    }

    #[test]
    fn hashes_are_first_numbers() {
        assert_eq!(hash(0, 42), Rng::new(42).next_u64());
        assert_eq!(hash(5, 42), Rng::new(5 ^ 42).next_u64());
    }

    #[test]
    fn samples_are_distinct_and_sorted() {
        let mut rng = Rng::new(1);
        for (n, count) in [(10, 3), (10, 10), (5, 9), (1000, 999), (1, 0)] {
            let sample = rng.sample(n, count);
            assert_eq!(sample.len(), count.min(n));
            assert!(sample.windows(2).all(|w| w[0] < w[1]) && sample.iter().all(|&i| i < n));
        }
    }

    #[test]
    fn normal_has_unit_variance() {
        let mut rng = Rng::new(3);
        let draws: Vec<f64> = (0..20_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / 20_000.0;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / 20_000.0 - mean * mean;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
    }
}
