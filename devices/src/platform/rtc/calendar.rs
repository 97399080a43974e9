//! The proleptic Gregorian calendar in UTC.

use serde::{Deserialize, Serialize};

/// A moment in UTC. A guest may set any values: they are brought into range when they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DateTime {
    /// 0 to 9999.
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
}

const DAY: i64 = 86_400;
/// Days of 400 years, after which the calendar repeats.
const ERA: i64 = 146_097;
/// From 0000-03-01, where a computed year begins, to 1970-01-01.
const EPOCH: i64 = 719_468;

impl DateTime {
    /// The moment `seconds` after 1970 began; the years before 0 and after 9999 are cut to that range.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let days = days.clamp(-719_528, 2_932_896) + EPOCH;
        let (era, day) = (days.div_euclid(ERA), days.rem_euclid(ERA));
        // A leap day ends each 4th year but the 100th, and each 400th: take them out to count years.
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        // Counted from March, months have 153 days in every five.
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year + i64::from(month <= 2);
        Self {
            year: year as u16,
            month: month as u8,
            day: day as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// Seconds since 1970 began.
    pub(super) fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year.min(9999)) - i64::from(month <= 2);
        let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
        let from_march = (month + 9) % 12;
        let day = (153 * from_march + 2) / 5 + i64::from(self.day.clamp(1, 31)) - 1;
        let days = era * ERA + year * 365 + year / 4 - year / 100 + day - EPOCH;
        let time = [(self.hour, 23, 3600), (self.minute, 59, 60), (self.second, 59, 1)];
        days * DAY + time.iter().map(|(n, most, unit)| i64::from(*n.min(most)) * unit).sum::<i64>()
    }

    /// 1 on Sundays to 7 on Saturdays.
    pub(super) fn day_of_week(self) -> u8 {
        ((self.to_unix().div_euclid(DAY) + 4).rem_euclid(7) + 1) as u8 // 1970 began on a Thursday
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(year: u16, month: u8, day: u8) -> DateTime {
        DateTime { year, month, day, hour: 0, minute: 0, second: 0 }
    }

    #[test]
    fn known_moments_are_found_and_found_again() {
        for (seconds, time) in [
            (0, at(1970, 1, 1)),
            (951_782_400, at(2000, 2, 29)),
            (4_107_542_400, at(2100, 3, 1)),
            (-2_208_988_800, at(1900, 1, 1)),
            (1_709_251_199, DateTime { hour: 23, minute: 59, second: 59, ..at(2024, 2, 29) }),
        ] {
            assert_eq!(DateTime::from_unix(seconds), time);
            assert_eq!(time.to_unix(), seconds);
        }
        assert_eq!(at(1970, 1, 1).day_of_week(), 5);
        assert_eq!(at(2024, 2, 29).day_of_week(), 5);
    }

    #[test]
    fn every_day_of_eight_centuries_follows_the_one_before() {
        let first = at(1700, 1, 1).to_unix();
        for day in 0..2 * ERA {
            let time = DateTime::from_unix(first + day * DAY);
            assert_eq!(time.to_unix(), first + day * DAY, "{time:?}");
        }
    }

    #[test]
    fn values_out_of_range_are_cut() {
        let wild = DateTime { year: u16::MAX, month: 99, day: 99, hour: 99, minute: 99, second: 99 };
        assert_eq!(
            wild.to_unix(),
            DateTime { hour: 23, minute: 59, second: 59, ..at(9999, 12, 31) }.to_unix()
        );
        assert_eq!(DateTime::from_unix(i64::MAX).year, 9999);
        assert_eq!(DateTime::from_unix(i64::MIN).year, 0);
    }
}
