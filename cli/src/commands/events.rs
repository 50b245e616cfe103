//! `events`.

use anyhow::Result;

use crate::args::{EventsArgs, Global};
use crate::convert;
use crate::output::{print_json, print_line, time};

pub(crate) async fn run(global: &Global, args: EventsArgs) -> Result<()> {
    let mut events = if args.from_backup {
        global.backup_client()?.backup().events(args.after)
    } else {
        global.primary_client()?.replication().events(args.after)
    };
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 {
        let event = tokio::select! {
            event = events.next() => event?,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        if global.json {
            print_json(&convert::event(&event))?;
        } else {
            let mut line = format!("{} {} {} {}", event.number, time(event.time_unix_ms), event.kind, event.message);
            let fields: std::collections::BTreeMap<_, _> = event.fields.iter().collect();
            for (name, value) in fields {
                line += &format!(" {name}={value}");
            }
            print_line(&line)?;
        }
        left -= 1;
    }
    Ok(())
}
