use super::*;

fn write(at_us: u64, device: u32, offset_bytes: u64, length_bytes: u64) -> TraceWrite {
    TraceWrite { at_us, device, offset_bytes, length_bytes }
}

#[test]
fn fio_version_3_is_read_with_its_times() {
    let text = "fio version 3 iolog\n\
        0 /dev/sda add\n\
        1 /dev/sda open\n\
        100 /dev/sda write 4096 8192\n\
        150 /dev/sda read 0 4096\n\
        160 /dev/sda trim 0 4096\n\
        170 /dev/sda sync 0 0\n\
        1000100 /dev/sdb write 0 512\n\
        1000200 /dev/sda close\n";
    let trace = parse(text.as_bytes(), None).unwrap();
    assert_eq!(trace.writes, [write(0, 0, 4096, 8192), write(1_000_000, 1, 0, 512)]);
    assert_eq!((trace.devices, trace.discards), (2, 1));
}

#[test]
fn fio_version_2_is_timed_by_a_rate_and_its_waits() {
    let text = "fio version 2 iolog\n/f add\n/f open\n/f write 0 1000000\n/f write 1000000 500000\n\
        /f wait 3000000 0\n/f wait 50 0\n/f write 0 1000\n";
    assert!(matches!(parse(text.as_bytes(), None), Err(TraceError::NoRate)));
    let trace = parse(text.as_bytes(), Some(1_000_000)).unwrap();
    assert_eq!(
        trace.writes,
        [write(0, 0, 0, 1_000_000), write(1_000_000, 0, 1_000_000, 500_000), write(3_000_000, 0, 0, 1000)]
    );
}

#[test]
fn blkparse_text_is_read_by_its_queue_events() {
    let text = "  8,0    3        1     0.000000000   697  C   W 8 + 8 [0]\n\
        \x20 8,0    3        2     0.500000000   697  Q  WS 16 + 8 [kjournald]\n\
        \x20 8,0    3        3     0.500001000   697  G  WS 16 + 8 [kjournald]\n\
        \x20 8,0    3        4     0.500002000   697  P   N [kjournald]\n\
        \x20 8,0    1        5     0.600000000   700  Q   R 400 + 8 [cat]\n\
        \x20 8,16   1        6     1.500000999   700  Q FWFS 0 + 16 [dd]\n\
        \x20 8,0    1        7     1.600000000   700  Q   D 0 + 1024 [fstrim]\n\
        \x20 8,0    1        8     1.700000000   700  C  WS 16 + 8 [0]\n\
        CPU3 (8,0):\n Reads Queued:           1,        4KiB\n\nTotal (8,0):\n";
    let trace = parse(text.as_bytes(), None).unwrap();
    assert_eq!(trace.writes, [write(0, 0, 8192, 4096), write(1_000_000, 1, 0, 8192)]);
    assert_eq!((trace.devices, trace.discards), (2, 1));
    // Without queue events, those that were issued.
    let issued = text.replace(" Q ", " D ");
    assert_eq!(parse(issued.as_bytes(), None).unwrap().writes.len(), 2);
}

#[test]
fn what_is_no_trace_is_refused_with_its_line() {
    for (text, part) in [
        ("", "is no trace"),
        ("<html>\n", "is no trace"),
        ("fio version 1 iolog\n", "is no trace"),
        ("fio version 3 iolog\n0 /f read 0 1\n", "holds no write"),
        ("fio version 3 iolog\n0 /f add\n0 /f write 0 many\n", "line 3: offset or length"),
        ("fio version 3 iolog\nsoon /f write 0 1\n", "line 2: the time"),
        ("fio version 3 iolog\n0 /f wait 100 0\n", "line 2: unknown action"),
        ("fio version 3 iolog\n/f write 0 1\n", "line 2: is neither"),
        ("8,0 3 1 0.0 697 Q W 99999999999999999999 + 8 [x]\n", "line 1: sector"),
        ("8,0 3 1 noon 697 Q W 1 + 8 [x]\n", "line 1: the time"),
    ] {
        let error = parse(text.as_bytes(), Some(1)).unwrap_err().to_string();
        assert!(error.contains(part), "{text:?}: {error}");
    }
}
