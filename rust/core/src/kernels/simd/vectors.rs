//! Two vectors combined value by value.

use super::{check, scalar, Simd, Widen, CACHE};

/// Combines two slices value by value: whole vectors with the first expression, the rest with the second.
macro_rules! zip {
    ($name:ident($($weight:ident: f32)?), |$old:ident, $new:ident| $vector:expr, $one:expr) => {
        #[inline(always)]
        pub(in crate::kernels) unsafe fn $name<S: Simd>(out: &mut [f32], x: &[f32] $(, $weight: f32)?) {
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

/// Rounds to a narrower type: whole vectors with the first function, the rest with the second.
macro_rules! narrow {
    ($name:ident, $store:ident) => {
        #[inline(always)]
        pub(in crate::kernels) unsafe fn $name<S: Widen>(x: &[f32], out: &mut [u16]) {
            check::pair(out, x);
            let whole = out.len() - out.len() % S::LANES;
            for t in (0..whole).step_by(S::LANES) {
                // SAFETY: both slices have `LANES` values from `t`.
                unsafe { S::load(x.as_ptr().add(t)).$store::<CACHE>(out.as_mut_ptr().add(t)) };
            }
            scalar::$name(&x[whole..], &mut out[whole..]);
        }
    };
}

narrow!(to_f16, store_f16);
narrow!(to_bf16, store_bf16);
