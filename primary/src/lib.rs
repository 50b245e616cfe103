//! Understudy's primary service.
