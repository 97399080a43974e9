//! The binary `omega`; all of it is in the library, so that it can be tested.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
