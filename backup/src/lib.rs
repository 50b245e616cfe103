//! Understudy's backup service.
