//! Fixed-width unsigned integers in bytes, least significant bit first.
//!
//! A row of codes is `fields` integers of `bits` bits each (1 to 24), one after the other, padded with zero bits to a
//! whole byte.

/// The widest field.
pub const MAX_BITS: u32 = 24;

/// The widest field of [`get_wide`].
pub const MAX_WIDE_BITS: u32 = 32;

/// Bytes of a row of `fields` integers of `bits` bits.
pub fn row_bytes(fields: usize, bits: u32) -> usize {
    (fields * bits as usize).div_ceil(8)
}

/// Field `index` of a row.
#[inline]
pub fn get(row: &[u8], bits: u32, index: usize) -> u32 {
    match bits {
        8 => return u32::from(row[index]),
        16 => return u32::from(u16::from_le_bytes([row[2 * index], row[2 * index + 1]])),
        _ => {}
    }
    let (at, shift) = (index * bits as usize / 8, index * bits as usize % 8);
    // A field of up to 24 bits with up to 7 bits before it touches at most four bytes.
    let mut word = 0u32;
    for (place, byte) in row[at..].iter().take(4).enumerate() {
        word |= u32::from(*byte) << (8 * place);
    }
    (word >> shift) & ((1u32 << bits) - 1)
}

/// Field `index` of a row, of up to 32 bits.
#[inline]
pub fn get_wide(row: &[u8], bits: u32, index: usize) -> u64 {
    let (at, shift) = (index * bits as usize / 8, index * bits as usize % 8);
    let word = match row[at..].first_chunk() {
        Some(word) => u64::from_le_bytes(*word),
        None => row[at..].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    };
    (word >> shift) & ((1 << bits) - 1)
}

/// Writes all fields of a row; bytes that no field reaches become zero.
pub fn pack(mut values: impl Iterator<Item = u32>, bits: u32, row: &mut [u8]) {
    if bits == 8 {
        for (byte, value) in row.iter_mut().zip(values) {
            *byte = value as u8;
        }
        return;
    }
    if bits == 4 {
        for byte in row {
            *byte = values.next().unwrap_or(0) as u8 | (values.next().unwrap_or(0) as u8) << 4;
        }
        return;
    }
    let (mut buffer, mut filled, mut at) = (0u64, 0u32, 0);
    for value in values {
        buffer |= u64::from(value) << filled;
        filled += bits;
        while filled >= 8 {
            row[at] = buffer as u8;
            buffer >>= 8;
            filled -= 8;
            at += 1;
        }
    }
    if filled > 0 {
        row[at] = buffer as u8;
        at += 1;
    }
    row[at..].fill(0);
}

/// Reads the first `out.len()` fields of a row.
pub fn unpack(row: &[u8], bits: u32, out: &mut [u32]) {
    for (index, value) in out.iter_mut().enumerate() {
        *value = get(row, bits, index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn wide_fields_are_where_bits_say(bits in 1u32..=MAX_WIDE_BITS, row in prop::collection::vec(any::<u8>(), 1..40)) {
            for index in 0..row.len() * 8 / bits as usize {
                let places = index * bits as usize..(index + 1) * bits as usize;
                let expected = places.rev().fold(0, |word, bit| word << 1 | u64::from(row[bit / 8] >> (bit % 8) & 1));
                prop_assert_eq!(get_wide(&row, bits, index), expected);
            }
        }

        #[test]
        fn pack_then_get(bits in 1u32..=MAX_BITS, raw in prop::collection::vec(any::<u32>(), 0..40)) {
            let values: Vec<u32> = raw.iter().map(|v| v & ((1 << bits) - 1)).collect();
            let mut row = vec![0xff; row_bytes(values.len(), bits)];
            pack(values.iter().copied(), bits, &mut row);
            let mut back = vec![0; values.len()];
            unpack(&row, bits, &mut back);
            prop_assert_eq!(&back, &values);
            // Bit i of field j stands at bit j * bits + i of the row.
            for (j, value) in values.iter().enumerate() {
                for i in 0..bits {
                    let place = j * bits as usize + i as usize;
                    prop_assert_eq!(u32::from(row[place / 8] >> (place % 8)) & 1, (value >> i) & 1);
                }
            }
        }
    }
}
