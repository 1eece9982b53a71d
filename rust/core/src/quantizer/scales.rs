//! Scales as rows store them, and the scales of levels that stand in a table.

use crate::algo::levels::LevelTable;
use crate::decoder::ScaleDtype;
use crate::error::{Error, Result};
use half::f16;

/// How the scales of a table are stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scales {
    pub(super) dtype: ScaleDtype,
    /// Power of two that stored scales are multiplied by.
    pub(super) factor: f32,
}

impl Scales {
    /// For scales up to `largest`. Float16: brought near 2^8, so that new rows may be 100 times larger, and rows 10^6 times
    /// smaller than the largest keep full precision. One byte: rows may be four times larger, and 2000 times smaller.
    pub(super) fn new(dtype: ScaleDtype, largest: f32) -> Self {
        let headroom = match dtype {
            ScaleDtype::Float16 => 8,
            ScaleDtype::Float8 => -2,
        };
        Scales { dtype, factor: factor(largest, headroom) }
    }

    /// The nearest number that can be stored, as its bits.
    fn bits(self, scale: f32) -> u16 {
        let bits = f16::from_f32(scale / self.factor).to_bits();
        match self.dtype {
            ScaleDtype::Float16 => bits,
            // Rows that are not zero keep the smallest scale.
            ScaleDtype::Float8 => ((bits.saturating_add(32)) >> 6).max(u16::from(scale > 0.0)),
        }
    }

    fn value(self, bits: u16) -> f32 {
        match self.dtype {
            ScaleDtype::Float16 => f16::from_bits(bits).to_f32() * self.factor,
            ScaleDtype::Float8 => f16::from_bits(bits << 6).to_f32() * self.factor,
        }
    }

    /// A scale as it will be read back.
    pub(super) fn round(self, scale: f32) -> f32 {
        self.value(self.bits(scale))
    }

    /// The next larger scale after the one that `scale` is rounded to.
    pub(super) fn above(self, scale: f32) -> f32 {
        self.value(self.bits(scale) + 1)
    }

    /// Writes a scale at the front of `code`.
    pub(super) fn write(self, scale: f32, code: &mut [u8]) -> Result<()> {
        let bits = self.bits(scale);
        match self.dtype {
            ScaleDtype::Float16 if f16::from_bits(bits).is_finite() => code[..2].copy_from_slice(&bits.to_le_bytes()),
            ScaleDtype::Float8 if bits < 256 => code[0] = bits as u8,
            _ => return Err(too_large()),
        }
        Ok(())
    }
}

/// A row's scale does not fit.
pub(super) fn too_large() -> Error {
    Error::OutOfRange {
        what: "a row is much larger than any row that was fitted".into(),
        why: "fit again with rows like it".into(),
    }
}

/// The power of two p with `largest` / p in [2^headroom, 2^(headroom + 1)), or the smallest normal one.
pub(super) fn factor(largest: f32, headroom: i32) -> f32 {
    let exponent = ((largest.to_bits() >> 23) as i32 - 127 - headroom).clamp(-126, 127);
    if largest == 0.0 {
        return 1.0;
    }
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// How a scale for levels of a table is chosen.
pub(super) struct Chooser<'a> {
    pub(super) table: &'a LevelTable,
    /// Look for the least squared error; else the largest value becomes the largest level.
    pub(super) search: bool,
    /// None where scales are stored as they are.
    pub(super) stored: Option<Scales>,
}

impl Chooser<'_> {
    /// The scale for some values, as it will be read back; `places` are filled with their levels.
    pub(super) fn choose(&self, values: &[f32], places: &mut [u8]) -> f32 {
        let round = |scale: f32| self.stored.map_or(scale, |stored| stored.round(scale));
        let reach = values.iter().fold(0f32, |reach, value| reach.max(value.abs()));
        let full = round(reach / self.table.reach());
        self.table.nearest(values, full, places);
        if !self.search || full == 0.0 {
            return full;
        }
        let (mut best, mut least) = (full, self.table.error(values, places, full));
        let (full_error, mut tried) = (least, vec![0; values.len()]);
        // Smaller scales cut off the largest values: that pays more the fewer the levels.
        for shrink in 1..=28 {
            let scale = full * (1.0 - 0.03 * shrink as f32);
            self.table.nearest(values, scale, &mut tried);
            let error = self.table.error(values, &tried, scale);
            if error < least {
                (best, least) = (scale, error);
            }
        }
        let best = round(self.table.refine(values, best, 6, &mut tried));
        self.table.nearest(values, best, &mut tried);
        if best > 0.0 && self.table.error(values, &tried, best) < full_error {
            places.copy_from_slice(&tried);
            return best;
        }
        full
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_keeps_a_scale_to_a_thirtieth() {
        let scales = Scales::new(ScaleDtype::Float8, 3.0);
        for scale in [3.0f32, 11.9, 1.0, 0.1, 0.0117, 2.5e-3] {
            assert!((scales.round(scale) / scale - 1.0).abs() <= 1.0 / 32.0, "{scale}");
            assert!(scales.above(scale) > scales.round(scale));
        }
        let mut code = [0];
        assert_eq!(scales.round(0.0), 0.0);
        assert!(scales.round(1e-9) > 0.0);
        assert!(scales.write(100.0, &mut code).is_err() && scales.write(11.9, &mut code).is_ok());
        assert_eq!(scales.value(code[0].into()), scales.round(11.9));
    }

    #[test]
    fn factors_are_powers_of_two() {
        for (largest, expected) in [(1.0, 1.0 / 256.0), (1.99, 1.0 / 256.0), (300.0, 1.0), (0.0, 1.0)] {
            assert_eq!(factor(largest, 8), expected);
        }
    }
}
