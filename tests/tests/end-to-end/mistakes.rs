pub(crate) const TESTS: &[(&str, crate::Test)] = &[];
