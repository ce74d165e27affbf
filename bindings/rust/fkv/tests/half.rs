// SPDX-License-Identifier: Apache-2.0
//! Conversions of the 16-bit types: all values, all ties, and against what the library stores.
mod common;
use common::*;
use fkv::*;

/// The value of a binary16 pattern, from its definition.
fn value_of(bits: u16) -> f64 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 0x3ff));
    match exponent {
        0 => sign * fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => sign * f64::INFINITY,
        31 => f64::NAN,
        _ => sign * (1024.0 + fraction) * 2f64.powi(exponent - 25),
    }
}

#[test]
fn every_half_is_its_value_and_comes_back() {
    for bits in 0..=u16::MAX {
        let (value, expected) = (F16(bits).to_f32(), value_of(bits));
        if expected.is_nan() {
            assert!(value.is_nan() && F16::from_f32(value).to_f32().is_nan());
        } else {
            assert_eq!(f64::from(value), expected);
            assert_eq!(F16::from_f32(value).0, bits);
        }
        let wide = Bf16(bits).to_f32();
        if wide.is_nan() {
            assert!(Bf16::from_f32(wide).to_f32().is_nan());
        } else {
            assert_eq!(Bf16::from_f32(wide).0, bits);
        }
    }
}

/// Between two neighbours: the middle goes to the even one, what is beside it to the nearer.
#[test]
fn rounding_is_to_nearest_even() {
    let check = |low: f32, high: f32, low_bits: u16, convert: &dyn Fn(f32) -> u16| {
        let middle = (f64::from(low) + f64::from(high)) / 2.0;
        let middle = middle as f32; // exact: one bit more than a half has
        let even = if low_bits % 2 == 0 {
            low_bits
        } else {
            low_bits + 1
        };
        let next = |x: f32, by: i32| f32::from_bits((x.to_bits() as i32 + by) as u32);
        assert_eq!(convert(middle), even, "{middle}");
        assert_eq!(convert(next(middle, -1)), low_bits);
        assert_eq!(convert(next(middle, 1)), low_bits + 1);
        assert_eq!(convert(-middle), even | 0x8000);
    };
    for bits in 0..0x7bffu16 {
        check(F16(bits).to_f32(), F16(bits + 1).to_f32(), bits, &|x| {
            F16::from_f32(x).0
        });
    }
    for bits in 1..0x7f7fu16 {
        check(Bf16(bits).to_f32(), Bf16(bits + 1).to_f32(), bits, &|x| {
            Bf16::from_f32(x).0
        });
    }
    assert_eq!(F16::from_f32(65519.996), F16(0x7bff));
    assert_eq!(F16::from_f32(65520.0), F16(0x7c00));
    assert_eq!(F16::from_f32(f32::MAX), F16(0x7c00));
    assert_eq!(F16::from_f32(f32::MIN_POSITIVE / 2.0), F16(0));
    assert_eq!(Bf16::from_f32(f32::MAX), Bf16(0x7f80));
    assert_eq!(F16::from_f32(-0.0), F16(0x8000));
}

#[test]
fn the_library_rounds_the_same() {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let mut s = setup(&ModelParams::new(1, 1, 1, 8), dtype);
        let sequence = s.cache.create_sequence().unwrap();
        let tokens = 500;
        let mut numbers = Numbers::new(21);
        let data: Vec<f32> = (0..tokens * 8)
            .map(|i| numbers.next() * 2f32.powi(i as i32 % 40 - 26))
            .collect();
        let kv = TensorRef::new(&data, &[tokens, 1, 8]).unwrap();
        let mut batch = Batch::new();
        batch.push(&sequence, tokens);
        s.plan.update(&s.cache, &batch).unwrap();
        s.plan.append(&mut s.cache, 0, &kv, &kv).unwrap();
        let mut held = vec![0f32; data.len()];
        let mut view = TensorMut::new(&mut held, &[tokens, 1, 8]).unwrap();
        s.cache
            .read(&sequence, 0, 0..tokens, None, Some(&mut view))
            .unwrap();
        let rounded: Vec<f32> = data
            .iter()
            .map(|&x| match dtype {
                Dtype::F16 => F16::from_f32(x).to_f32(),
                _ => Bf16::from_f32(x).to_f32(),
            })
            .collect();
        assert_eq!(held, rounded);
    }
}

#[test]
fn memory_as_bits() {
    let mut bits = [1u16, 2, 3];
    assert_eq!(F16::from_bits(&bits), [F16(1), F16(2), F16(3)]);
    F16::from_bits_mut(&mut bits)[1] = F16(7);
    Bf16::from_bits_mut(&mut bits)[2] = Bf16(9);
    assert_eq!(bits, [1, 7, 9]);
    assert_eq!(Bf16::from_bits(&bits[..0]), []);
}
